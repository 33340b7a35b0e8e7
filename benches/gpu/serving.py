"""Sconce over checkpoints of `make_checkpoint.py`, and load for it. Knows no figures."""

import hashlib
import itertools
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "compare"))

import client

FILES = ["model.safetensors", "config.json", "tokenizer.json"]


def checksum(path):
    """Kept beside the file, for gigabytes take their time."""
    stamp = [path.stat().st_size, path.stat().st_mtime_ns]
    kept = path.with_name(path.name + ".sha256")
    if kept.exists():
        known = json.loads(kept.read_text())
        if known["stamp"] == stamp:
            return known["sha256"]
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    kept.write_text(json.dumps({"stamp": stamp, "sha256": sha256}))
    return sha256


def manifest(name, folder, limits):
    kind = json.loads((folder / "config.json").read_text())["model_type"]
    lines = [f'name = "{name}"', f'task = "{"embed" if kind == "bert" else "generate"}"',
             'license = "CC0-1.0"']
    for file in FILES:
        path = (folder / file).resolve()
        lines += ["[[files]]", f'file = "{file}"', f'sha256 = "{checksum(path)}"',
                  f"bytes = {path.stat().st_size}", f'sources = ["file:{path}"]']
    lines += ["[limits]", *(f"{key} = {value}" for key, value in limits.items())]
    return "\n".join(lines) + "\n"


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def device_bytes():
    """What is in use of the first GPU."""
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    lines = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    return int(lines.splitlines()[0]) << 20


def memory_bytes(servers):
    """What servers that run side by side use: of the device, or of the machine where that is the
    device."""
    if servers[0].device == "cuda":
        return device_bytes() - min(server.before for server in servers)
    used = 0
    for server in servers:
        status = Path(f"/proc/{server.process.pid}/status").read_text()
        line = next(line for line in status.splitlines() if line.startswith("VmRSS"))
        used += int(line.split()[1]) << 10
    return used


class Server:
    """A server of `models`: folders by name. Ends with its `with` block."""

    def __init__(self, binary, device, models, limits=None, extra=(), patience=240):
        self.home = tempfile.TemporaryDirectory(prefix="sconce-gpu-")
        home = Path(self.home.name)
        (home / "models").mkdir()
        for name, folder in models.items():
            text = manifest(name, Path(folder), (limits or {}).get(name, {}))
            (home / "models" / f"{name}.toml").write_text(text)
        # Kept, for it remembers which files have been verified.
        cache = next(iter(map(Path, models.values()))).resolve().parent / "cache"
        self.address, self.admin = [("127.0.0.1", free_port()) for _ in range(2)]
        self.log = home / "log"
        command = [binary, "serve", "--host", "127.0.0.1", "--port", self.address[1],
                   "--admin-host", "127.0.0.1", "--admin-port", self.admin[1],
                   "--models-dir", home / "models", "--cache-dir", cache,
                   "--device-kind", device, "--offline", *extra]
        # By the device's own sum: in a container the driver's process numbers are the host's.
        self.before = device_bytes() if device == "cuda" else 0
        self.device, self.patience, self.begun = device, patience, time.perf_counter()
        with self.log.open("wb") as log:
            self.process = subprocess.Popen([str(part) for part in command], stdout=log,
                                            stderr=log, cwd=home)

    def __enter__(self):
        while client.get(self.address, "/readyz")[0] != 200:
            late = time.perf_counter() - self.begun > self.patience
            if self.process.poll() is not None or late:
                self.stop()
                raise SystemExit(f"the server does not start:\n{self.tail()}")
            time.sleep(0.02)
        self.ready = time.perf_counter() - self.begun
        return self

    def __exit__(self, *_):
        self.stop()
        self.home.cleanup()

    def tail(self):
        return self.log.read_text(errors="replace")[-4000:]

    def stop(self):
        if self.process.poll() is None:
            # The second says that nobody waits for a drain.
            self.process.send_signal(signal.SIGTERM)
            time.sleep(0.2)
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def step_seconds(self, kind):
        """How long a step of a kind (decode, prefill, mixed, encode) took on the device, on
        average since the start."""
        text = client.get(self.admin, "/metrics")[1].decode()
        found = lambda part: sum(
            float(line.rsplit(" ", 1)[1]) for line in text.splitlines()
            if line.startswith(f"sconce_step_duration_seconds_{part}{{") and f'"{kind}"' in line
        )
        return found("sum") / count if (count := found("count")) else None

    def complete(self, model, tokens, count, **more):
        body = {"model": model, "prompt": tokens, "max_tokens": count, "temperature": 0,
                "ignore_eos": True, **more}
        return client.post(self.address, "/v1/completions", body)


class Timed(client.Connection):
    """A connection that also notes the time between a stream's events."""

    last = None

    def send(self, poll):
        self.last = None
        return super().send(poll)

    def events(self, seen, piece, now):
        before = seen.events
        ended = super().events(seen, piece, now)
        if seen.events > before:
            if self.last is not None:
                seen.gaps.append(now - self.last)
            self.last = now
        return ended


class Seen(client.Seen):
    def __init__(self):
        super().__init__()
        self.gaps = []

    def gap(self, share):
        ranked = sorted(self.gaps)
        return ranked[min(len(ranked) - 1, int(share * len(ranked)))] if ranked else float("nan")


def load(groups, seconds, ramp=1.0):
    """Runs groups of clients side by side for `seconds` after a `ramp` that does not count. A group
    is an address, a path and an iterator of bodies for each client. What each group saw."""
    poll, owners = selectors.DefaultSelector(), {}
    for index, (address, path, clients) in enumerate(groups):
        for bodies in clients:
            connection = Timed(address, path, bodies)
            owners[connection] = index
            connection.send(poll)
    seen, ramped, begun = [Seen() for _ in groups], False, time.perf_counter()
    while True:
        for key, _ in poll.select(timeout=1):
            connection = key.data
            if connection.read(poll, seen[owners[connection]], time.perf_counter()):
                connection.send(poll)
        now = time.perf_counter()
        if not ramped and now - begun >= ramp:
            ramped, begun, seen = True, now, [Seen() for _ in groups]
        elif ramped and now - begun >= seconds:
            break
    for one in seen:
        one.seconds = time.perf_counter() - begun
    for connection in owners:
        connection.close(poll)
    return seen


def prompts(model, length, tokens, seed=0):
    """Streams without end, no two with the same prompt."""
    state = seed * 2654435761 + 12345
    while True:
        prompt = []
        for _ in range(length):
            state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
            prompt.append((state >> 40) % 256)
        yield {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0,
               "ignore_eos": True, "stream": True}


def texts(model, length, batch, seed=0):
    """Embedding requests without end, of `batch` inputs of `length` tokens: a few that take turns,
    for the thread that makes them is the one that looks at the clock."""
    bodies = []
    for body in itertools.islice(prompts(model, length * batch, 1, seed), 4):
        rows = [body["prompt"][i * length : (i + 1) * length] for i in range(batch)]
        bodies.append({"model": model, "input": rows, "encoding_format": "base64"})
    return itertools.cycle(bodies)


def default_binary():
    return os.environ.get("SCONCE", "sconce")
