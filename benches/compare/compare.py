"""Sconce beside its peers, on this machine, in one run: `python3 benches/compare/compare.py`.

Builds and installs the peers on first use (minutes), then takes turns: each round of each row
measures every contestant, one at a time, all servers idle but the one under test, so that a change
of the machine's speed meets all alike. Prints medians and ratios, writes a markdown table.

Same files, same prompts, same number of new tokens, greedy, the end of sequence ignored. The
client is one thread on raw sockets, on the same cores, the same for all servers. Encoder peers run
in process, without HTTP; Sconce answers over HTTP all the same."""

import argparse
import itertools
import json
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import client
from peers import Peers, Server

ROOT = Path(__file__).resolve().parents[2]
GENERATOR, ENCODER = "smollm2-135m-instruct", "all-minilm-l6-v2"
NEW_TOKENS = 64
SLOTS = 32
WORDS = (
    "harbour lamp keeper wall fog morning boat quiet stone letter winter road garden window "
    "candle river story market bread music paper mountain bridge station village summer"
).split()


def words(count, seed):
    """`count` words that differ from those of any other seed from the first one on."""
    state = seed * 2654435761 + 12345
    chosen = []
    for _ in range(count):
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        chosen.append(WORDS[(state >> 33) % len(WORDS)])
    return f"{seed} " + " ".join(chosen)


SEED = itertools.count(int(time.time()) % 1_000_000)


def chat(user, tokens, system=None):
    messages = [{"role": "system", "content": system}] if system else []
    return {
        "model": GENERATOR,
        "messages": [*messages, {"role": "user", "content": user}],
        "max_tokens": tokens,
        "temperature": 0,
        "stream": True,
        "ignore_eos": True,
    }


def chats(prompt_words, tokens, system=None):
    """Requests without end, no two with the same prompt."""
    while True:
        yield chat(words(prompt_words, next(SEED)), tokens, system)


class Contestant:
    """A server of the chat model."""

    def __init__(self, name, address, server):
        self.name, self.address, self.server = name, address, server

    def wait(self, path):
        begun = time.perf_counter()
        while client.get(self.address, path)[0] != 200:
            if self.server.process.poll() is not None or time.perf_counter() - begun > 120:
                raise SystemExit(f"{self.name} does not start: see {self.server.log.name}")
            time.sleep(0.01)
        return time.perf_counter() - begun

    def load(self, clients, seconds=None, ramp=0.0):
        return client.load(self.address, "/v1/chat/completions", clients, seconds, ramp)

    def prompt_tokens(self, body):
        body = {**body, "stream": False, "max_tokens": 1}
        answer = client.post(self.address, "/v1/chat/completions", body)
        return answer["usage"]["prompt_tokens"]


class Encoder:
    """An encoder peer in a process of its own."""

    def __init__(self, kind, peers, folder):
        self.name = kind
        command = [peers.python, Path(__file__).parent / "encoder.py", kind, folder, peers.cache]
        self.process = subprocess.Popen(
            [str(part) for part in command], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=open(peers.cache / f"{kind}.log", "wb"), text=True,
        )
        if self.process.stdout.readline() != "ready\n":
            raise SystemExit(f"{kind} does not start: see {peers.cache / f'{kind}.log'}")

    def measure(self, texts, batch, seconds):
        task = {"texts": texts, "batch": batch, "seconds": seconds}
        self.process.stdin.write(json.dumps(task) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        return answer["texts"] / answer["seconds"], answer["vectors"]

    def stop(self):
        self.process.stdin.close()
        self.process.wait(timeout=30)


class OwnEncoder:
    """Sconce's encoder over HTTP, in one dtype: `auto` is bf16 where the processor multiplies it,
    else f32."""

    def __init__(self, address, dtype):
        self.name, self.address = f"sconce {dtype}", address
        self.model = f"{ENCODER}-{dtype}"

    def body(self, texts):
        return {"model": self.model, "input": texts, "encoding_format": "base64"}

    def measure(self, texts, batch, seconds):
        batches = itertools.cycle([texts[i : i + batch] for i in range(0, len(texts), batch)])
        # One text after the other, or two batches under way, so that the next is at hand.
        clients = [(self.body(batch) for batch in batches) for _ in range(1 if batch == 1 else 2)]
        path = "/v1/embeddings"
        seen = client.load(self.address, path, clients, seconds, ramp=min(0.3, seconds / 4))
        answer = client.post(self.address, path, {**self.body(texts[:batch]), "encoding_format": "float"})
        return seen.answers_a_second() * batch, [item["embedding"] for item in answer["data"]]


class Table:
    """Rows of the result: what was measured, and what it was to be."""

    def __init__(self):
        self.rows, self.notes = [], []

    def add(self, work, peer, ours, theirs, target, unit, higher=True):
        """Medians of both, and the median of the rounds' ratios."""
        pairs = [(o / t if higher else t / o) for o, t in zip(ours, theirs) if o and t]
        ratio = statistics.median(pairs)
        verdict = "" if target is None else ("yes" if ratio >= target else "**no**")
        self.rows.append({
            "work": work, "peer": peer, "unit": unit, "target": target, "verdict": verdict,
            "ours": statistics.median(ours), "theirs": statistics.median(theirs), "ratio": ratio,
            "spread": (min(pairs), max(pairs)),
        })
        row = self.rows[-1]
        print(
            f"{work} | {peer}: {row['ours']:.4g} : {row['theirs']:.4g} {unit} = {ratio:.2f} "
            f"({row['spread'][0]:.2f} to {row['spread'][1]:.2f}) {verdict or ''}", flush=True,
        )

    def note(self, text):
        self.notes.append(text)
        print(text, flush=True)

    def markdown(self):
        lines = [
            "| work | peer | Sconce | peer | ratio | to reach | reached |",
            "|---|---|---|---|---|---|---|",
        ]
        for row in self.rows:
            target = "" if row["target"] is None else f"{row['target']:g}"
            lines.append(
                f"| {row['work']} | {row['peer']} | {show(row['ours'])} {row['unit']} | "
                f"{show(row['theirs'])} {row['unit']} | {row['ratio']:.2f} | {target} | "
                f"{row['verdict']} |"
            )
        return "\n".join([*lines, "", *self.notes, ""])


def show(value):
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def turns(rounds, *measures):
    """Takes turns: one list of results for each measure, in another order every second round."""
    results = [[] for _ in measures]
    for round_number in range(rounds):
        order = list(enumerate(measures))
        for index, measure in order if round_number % 2 == 0 else reversed(order):
            results[index].append(measure())
    return results


class Comparison:
    def __init__(self, options):
        self.options, self.quick = options, options.quick
        self.seconds = 1.0 if self.quick else 5.0
        self.rounds = 1 if self.quick else 3
        self.peers = Peers(options.cache, options.llama, options.python)
        self.table, self.running, self.port = Table(), [], options.port

    # What runs.

    def start(self):
        self.peers.ensure_llama()
        self.peers.ensure_python()
        if not self.options.sconce:
            command = ["cargo", "build", "--release", "--quiet"]
            subprocess.run(command, check=True, cwd=ROOT)
        binary = Path(self.options.sconce or ROOT / "target/release/sconce").resolve()
        self.files = self.pull(binary)
        models = self.manifests()
        ports = ["--port", self.port, "--admin-port", self.port + 1]
        command = [binary, "serve", *ports, "--models-dir", models]
        self.memory(binary)
        self.sconce = self.launch("sconce", command, self.port, "/readyz")
        self.llama = {"Q4_1": self.llama_server(self.files["generator"], 2, "Q4_1")}
        for offset, name in [(3, "Q4_0"), (4, "Q8_0")]:
            file = self.peers.quantised(self.files["generator"], name)
            self.llama[name] = self.llama_server(file, offset, name)

    def launch(self, name, command, port, path):
        log = self.peers.cache / f"{name}.log"
        server = Server(command, log, cwd=ROOT)
        self.running.append(server)
        contestant = Contestant(name, ("127.0.0.1", port), server)
        contestant.ready = contestant.wait(path)
        return contestant

    def llama_server(self, model, offset, name):
        port = self.port + offset
        command = [
            self.peers.bin / "llama-server", "-m", model, "--port", port, "-t", "2",
            "-np", SLOTS, "-c", SLOTS * 1024, "--no-webui", *self.options.llama_args.split(),
        ]
        return self.launch(f"llama.cpp-{name}", command, port, "/health")

    def pull(self, binary):
        """Paths of the models' files, from Sconce's own cache."""
        subprocess.run([binary, "pull"], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
        home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
        cache = Path(os.environ.get("SCONCE_CACHE_DIR", home / "sconce")) / "models"
        found = {
            "generator": next(cache.glob(f"{GENERATOR}/*-model.gguf"), None),
            "encoder": next(cache.glob(f"{ENCODER}/*-model.safetensors"), None),
        }
        for name, path in [("generator", self.options.gguf), ("encoder", self.options.encoder)]:
            if path:
                found[name] = Path(path)
        if not all(found.values()):
            raise SystemExit(f"model files are not in {cache}: name them with --gguf, --encoder")
        return found

    def manifests(self):
        """The default models, and the encoder once more in each dtype."""
        folder = self.peers.cache / "manifests"
        folder.mkdir(exist_ok=True)
        for old in folder.glob("*.toml"):
            old.unlink()
        generator = (ROOT / f"models/{GENERATOR}.toml").read_text()
        (folder / "generator.toml").write_text(generator)
        encoder = (ROOT / f"models/{ENCODER}.toml").read_text()
        encoder = re.sub(r"(?m)^aliases.*\n", "", encoder)
        for dtype in ["auto", "int8"]:
            name = f'name = "{ENCODER}-{dtype}"\ndtype = "{dtype}"'
            text = re.sub(r'(?m)^name = .*$', name, encoder)
            (folder / f"encoder-{dtype}.toml").write_text(text)
        return folder

    # Rows of the table.

    def memory(self, binary):
        """Start and memory of the default pair, from a warm page cache."""
        sizes = [self.files[name].stat().st_size for name in ["generator", "encoder"]]
        ready = []
        for _ in range(self.rounds):
            ports = ["--port", self.port, "--admin-port", self.port + 1]
            command = [binary, "serve", *ports, "--models-dir", ROOT / "models"]
            begun = time.perf_counter()
            one = self.launch("sconce-default", command, self.port, "/readyz")
            ready.append(time.perf_counter() - begun)
            clients = [chats(60, 16) for _ in range(8)]
            one.load(clients, seconds=1.0)
            texts = [words(100, n) for n in range(32)]
            client.post(one.address, "/v1/embeddings", {"model": ENCODER, "input": texts})
            now, peak = one.server.resident_bytes()
            one.server.stop()
            self.running.remove(one.server)
        limit = 1.3 * sum(sizes) + 200e6
        seconds = statistics.median(ready)
        self.table.note(
            f"Default pair: ready after {seconds:.2f} s (to reach: 2 s); resident "
            f"{now / 1e6:.0f} MB after some load, {peak / 1e6:.0f} MB at most (to reach: "
            f"{limit / 1e6:.0f} MB, 1.3 × the weight files + 200 MB).\n"
        )

    def speed(self, contestant, streams, seconds=None):
        clients = [chats(40, NEW_TOKENS) for _ in range(streams)]
        ramp = 0.5 if self.quick else 1.0
        return contestant.load(clients, seconds or self.seconds, ramp).tokens_a_second()

    def streams(self):
        same, own = self.llama["Q4_1"], [self.llama["Q4_0"], self.llama["Q8_0"]]
        for streams, target in [(1, 2.0), (8, 5.0), (16, 5.0), (32, None)]:
            everyone = [self.sconce, same] + (own if streams > 1 else [])
            measures = [lambda one=one: self.speed(one, streams) for one in everyone]
            ours, theirs, *others = turns(self.rounds, *measures)
            work = f"decode, {streams} stream{'s'[: streams > 1]}"
            self.table.add(work, "llama.cpp, same file", ours, theirs, target, "tok/s")
            if others:
                best, name = max(
                    zip([theirs, *others], ["Q4_1", "Q4_0", "Q8_0"]),
                    key=lambda pair: statistics.median(pair[0]),
                )
                peer = f"llama.cpp, its best ({name})"
                self.table.add(work, peer, ours, best, 2.0, "tok/s")

    def prefill(self):
        """Prompts of 512 tokens, one at a time, one new token each."""
        system = self.sized(512)
        count = 3 if self.quick else 8

        def measure(one):
            bodies = (chat(self.prompt_of(system), 1) for _ in range(count))
            return 512 * count / one.load([bodies]).seconds

        contestants = [self.sconce, self.llama["Q4_1"]]
        ours, theirs = turns(self.rounds, *[lambda one=one: measure(one) for one in contestants])
        self.table.add("prefill, 512 tokens", "llama.cpp, same file", ours, theirs, 4.0, "tok/s")

    def sized(self, tokens):
        """How many words make a prompt of about `tokens`, template and all; same for everybody."""
        count = tokens // 2
        for _ in range(6):
            have = self.sconce.prompt_tokens(chat(words(count, 1), 1))
            count += round((tokens - have) * count / have)
        body = chat(words(count, 1), 1)
        ours, theirs = [one.prompt_tokens(body) for one in [self.sconce, self.llama["Q4_1"]]]
        if ours != theirs or abs(ours - tokens) > 3:
            raise SystemExit(f"a prompt of {tokens} tokens has {ours} here and {theirs} there")
        return count

    def prompt_of(self, count):
        return words(count, next(SEED))

    def arrivals(self):
        """Sixteen requests at once on an idle server: time to the first token."""
        count = self.sized(128)

        def measure(one):
            bodies = [iter([chat(self.prompt_of(count), 4)]) for _ in range(16)]
            first = one.load(bodies).first
            return statistics.median(first), max(first)

        contestants = [self.sconce, self.llama["Q4_1"]]
        ours, theirs = turns(
            2 * self.rounds, *[lambda one=one: measure(one) for one in contestants]
        )
        peer = "llama.cpp, same file"
        for index, name in enumerate(["p50", "last"]):
            pick = [[1e3 * result[index] for result in side] for side in (ours, theirs)]
            target = 4.0 if index == 0 else None
            work = f"16 arrivals of 128 tokens: first token, {name}"
            self.table.add(work, peer, *pick, target, "ms", higher=False)

    def shared_prompt(self):
        """A system prompt of 512 tokens that all share, a short question, 16 new tokens."""
        system = words(self.sized(512), 7)

        def measure(one):
            clients = [chats(8, 16, system) for _ in range(16)]
            ramp = 0.5 if self.quick else 2.0
            # The peer takes seconds for one answer.
            return one.load(clients, 4 * self.seconds, ramp).answers_a_second()

        contestants = [self.sconce, self.llama["Q4_1"]]
        ours, theirs = turns(self.rounds, *[lambda one=one: measure(one) for one in contestants])
        peer = "llama.cpp, same file, prompt cache on"
        self.table.add("shared 512-token prompt, 16 clients", peer, ours, theirs, 5.0, "req/s")

    def encoders(self):
        folder = self.sentence_folder()
        kinds = ["sentence-transformers", "onnxruntime", "onnxruntime-int8"]
        theirs = [Encoder(kind, self.peers, folder) for kind in kinds]
        own = [OwnEncoder(self.sconce.address, dtype) for dtype in ["auto", "int8"]]
        try:
            for tokens, word_count in [(14, 11), (128, None)]:
                for batch in [32, 1]:
                    self.encode(own, theirs, (tokens, word_count, batch))
        finally:
            for one in theirs:
                one.stop()

    def encode(self, own, theirs, shape):
        tokens, word_count, batch = shape
        texts = [self.text(tokens, n) for n in range(64)]
        seconds = 0.5 if self.quick else 3.0
        worst = {}

        def measure(one):
            speed, vectors = one.measure(texts, batch, seconds)
            worst[one.name] = vectors
            return speed

        everyone = [*own, *theirs]
        results = turns(self.rounds, *[lambda one=one: measure(one) for one in everyone])
        by = dict(zip([one.name for one in everyone], results))
        work = f"MiniLM, {tokens} tokens, {'one text' if batch == 1 else f'{batch} texts'}"
        for ours, peer, target in [
            ("sconce auto", "sentence-transformers", 1.8),
            ("sconce auto", "onnxruntime", 1.35),
            ("sconce int8", "onnxruntime-int8", 1.3),
        ]:
            name = f"{work}, int8" if "int8" in ours else work
            self.table.add(name, peer, by[ours], by[peer], target, "texts/s")
        exact = worst["sentence-transformers"]
        cosines = {name: lowest(vectors, exact) for name, vectors in worst.items()}
        print("  cosines:", {name: round(value, 6) for name, value in cosines.items()}, flush=True)

    def text(self, tokens, number):
        """A text of exactly `tokens` tokens, the two special ones included: each of its words is
        one token."""
        state, chosen = number + 1, []
        for _ in range(tokens - 2):
            state = (state * 1103515245 + 12345) % 2**31
            chosen.append(WORDS[(state >> 8) % len(WORDS)])
        return " ".join(chosen)

    def sentence_folder(self):
        """The encoder's files under the names that sentence-transformers looks for."""
        source, folder = self.files["encoder"].parent, self.peers.cache / "minilm"
        (folder / "1_Pooling").mkdir(parents=True, exist_ok=True)
        names = {"pooling.json": "1_Pooling/config.json", "modules.json": "unused.json"}
        for path in source.glob("*.*"):
            # Sconce's cache puts a piece of the checksum before the name.
            name = re.sub(r"^[0-9a-f]{16}-", "", path.name)
            target = folder / names.get(name, name)
            if path.suffix in [".json", ".safetensors"] and not target.exists():
                target.symlink_to(path.resolve())
        kinds = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
        modules = [
            {"idx": index, "name": str(index), "path": path,
             "type": f"sentence_transformers.models.{kind}"}
            for index, (path, kind) in enumerate(kinds)
        ]
        (folder / "modules.json").write_text(json.dumps(modules))
        return folder

    def neighbours(self):
        """Two processes that keep both cores busy beside it."""
        contestants = [self.sconce, self.llama["Q4_1"]]
        idle = turns(self.rounds, lambda: self.speed(self.sconce, 8))[0]
        busy = [multiprocessing.Process(target=spin, daemon=True) for _ in range(2)]
        for process in busy:
            process.start()
        try:
            measures = [lambda one=one: self.speed(one, 8) for one in contestants]
            ours, theirs = turns(self.rounds, *measures)
        finally:
            for process in busy:
                process.terminate()
        work = "decode, 8 streams, two busy processes beside"
        self.table.add(work, "llama.cpp, same file", ours, theirs, 4.0, "tok/s")
        self.table.add(work, "Sconce on an idle machine", ours, idle, 0.4, "tok/s")

    def run(self):
        begun = time.perf_counter()
        parts = ["streams", "prefill", "arrivals", "shared_prompt", "encoders", "neighbours"]
        try:
            self.start()
            prepared = time.perf_counter() - begun
            for part in parts if not self.options.only else self.options.only.split(","):
                getattr(self, part)()
        finally:
            for server in self.running:
                server.stop()
        spent = time.perf_counter() - begun - prepared
        print(f"measured for {spent:.0f} s")
        text = self.table.markdown()
        print("\n" + text)
        if self.options.output:
            Path(self.options.output).write_text(text)


def lowest(vectors, others):
    """The lowest cosine of pairs of unit vectors."""
    return min(sum(a * b for a, b in zip(x, y)) for x, y in zip(vectors, others))


def spin():
    while True:
        pass


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "sconce-peers"
    parser.add_argument("--cache", default=cache, help="where peers are built and kept")
    parser.add_argument("--llama", help="folder of a llama-server that is there already")
    parser.add_argument("--llama-args", default="", help="more arguments for llama-server")
    parser.add_argument("--python", help="a Python that has onnxruntime, sentence-transformers")
    parser.add_argument("--sconce", help="the binary; by default the release build of this tree")
    parser.add_argument("--gguf", help="the chat model's file, if not in Sconce's cache")
    parser.add_argument("--encoder", help="the encoder's model.safetensors, likewise")
    parser.add_argument("--port", type=int, default=18700, help="the first of five free ports")
    parser.add_argument("--quick", action="store_true", help="does it work at all: a minute or two")
    parser.add_argument("--only", help="parts, with commas: streams, prefill, arrivals, "
                        "shared_prompt, encoders, neighbours")
    parser.add_argument("--output", help="file for the markdown table")
    Comparison(parser.parse_args()).run()


if __name__ == "__main__":
    main()
