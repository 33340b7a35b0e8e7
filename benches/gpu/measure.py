"""The rows of RESULTS.md, one a call, so that each fits ten minutes:

    python benches/gpu/measure.py ROW CHECKPOINTS [--binary sconce] [--device cuda] [--quick]

CHECKPOINTS is a folder with those of `make_checkpoint.py`, each named by its shape. Prints a line
of JSON for each figure, and whether it reaches what the row asks for. `--quick` takes tiny shapes
and short times: to see that the scripts work. Needs a GPU's nvidia-smi; peers need torch and
transformers."""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import serving
from serving import Server, load, prompts, texts

HERE = Path(__file__).parent
CHAT, ENCODE = "/v1/completions", "/v1/embeddings"


class Bench:
    def __init__(self, args):
        self.args, self.quick, self.device = args, args.quick, args.device
        self.seconds = args.seconds or (2.0 if args.quick else 15.0)
        self.tokens = 24 if args.quick else 256

    def folder(self, shape):
        if self.quick:
            kind = shape.partition("-")[0]
            shape = {"bge": "tiny-bert", "qwen3": "tiny-qwen3"}.get(kind, "tiny-llama")
        folder = self.args.checkpoints / shape
        if not folder.is_dir():
            raise SystemExit(f"{folder} is missing: make_checkpoint.py {shape} {folder}")
        return folder

    def server(self, models, limits=None, extra=()):
        models = {name: self.folder(shape) for name, shape in models.items()}
        return Server(self.args.binary, self.device, models, limits, extra)

    def say(self, reached=None, **figures):
        print(json.dumps({"row": self.args.row, **figures, "reached": reached}), flush=True)

    def peer(self, what, *args):
        """What a peer measured; none where it cannot run, which is said."""
        command = [sys.executable, HERE / "peers.py", what, *args, "--device", self.device]
        command = [str(part) for part in command]
        done = subprocess.run(command, capture_output=True, text=True, timeout=420)
        if done.returncode != 0:
            self.say(peer=what, failed=done.stderr.strip().splitlines()[-1:])
            return None
        return json.loads(done.stdout.splitlines()[-1])

    def weight_bytes(self, shape):
        """Bytes that a decode step reads: all but a table of which it reads single rows."""
        folder = self.folder(shape)
        config = json.loads((folder / "config.json").read_text())
        size = (folder / "model.safetensors").stat().st_size
        if config.get("tie_word_embeddings"):
            return size
        return size - 2 * config["vocab_size"] * config["hidden_size"]

    def decode(self, server, streams, prompt=128):
        clients = [prompts("model", prompt, self.tokens, seed) for seed in range(streams)]
        ramp = self.seconds / 5
        return load([(server.address, CHAT, clients)], self.seconds, ramp)[0]

    # Rows.

    def decode_1(self):
        bandwidth = self.peer("bandwidth")
        for shape, floor in [("qwen3-0.6b", 1200), ("llama-8b", None)]:
            if shape != (self.args.only or shape):
                continue
            with self.server({"model": shape}) as server:
                seen = self.decode(server, 1)
                step = server.step_seconds("decode")
            rate = 1 / statistics.median(seen.gaps)
            share = None
            if bandwidth:
                share = rate * self.weight_bytes(shape) / bandwidth["bytes_a_second"]
            reached = rate >= floor if floor else share is not None and share >= 0.75
            self.say(reached, model=shape, tokens_a_second=rate, share_of_bandwidth=share,
                     whole_requests_tokens_a_second=seen.tokens_a_second(), step_seconds=step,
                     ready_seconds=server.ready)

    def decode_64(self):
        with self.server({"model": "llama-8b"}) as server:
            ours = self.decode(server, 64).tokens_a_second()
            step = server.step_seconds("decode")
        self.say(ours=ours, step_seconds=step)
        tokens = ["--batch", 64, "--tokens", 16 if self.quick else 128]
        compiled = [] if self.quick else ["--compile"]
        theirs = self.peer("decode", self.folder("llama-8b"), *tokens, *compiled)
        theirs = theirs and theirs["tokens_a_second"]
        self.say(theirs and ours >= 1.5 * theirs, ours=ours, transformers=theirs,
                 step_seconds=step, ratio=theirs and ours / theirs)

    def embeddings(self):
        for length in [32] if self.quick else [128, 512]:
            if str(length) != (self.args.only or str(length)):
                continue
            with self.server({"model": "bge-large"}) as server:
                clients = [texts("model", length, 32, seed) for seed in range(4)]
                seen = load([(server.address, ENCODE, clients)], self.seconds, 1.0)[0]
                step = server.step_seconds("encode")
            ours = 32 * seen.answers_a_second()
            args = ["--length", length, "--batch", 64, "--seconds", self.seconds]
            theirs = self.peer("embed", self.folder("bge-large"), *args)
            theirs = theirs and theirs["texts_a_second"]
            self.say(theirs and ours >= 2 * theirs, tokens=length, ours=ours, peer=theirs,
                     step_seconds=step, ratio=theirs and ours / theirs)

    def mixed(self):
        with self.server({"chat": "qwen3-0.6b", "embed": "bge-large"}) as server:
            chats = lambda: [prompts("chat", 128, self.tokens, seed) for seed in range(8)]
            length = 32 if self.quick else 128
            batches = lambda: [texts("embed", length, 32, seed) for seed in range(4)]
            at = server.address
            alone = load([(at, CHAT, chats())], self.seconds)[0]
            embed = load([(at, ENCODE, batches())], self.seconds)[0]
            both = load([(at, CHAT, chats()), (at, ENCODE, batches())], self.seconds)
        shares = [both[0].tokens_a_second() / alone.tokens_a_second(),
                  both[1].answers_a_second() / embed.answers_a_second()]
        longer = both[0].gap(0.99) - alone.gap(0.99)
        self.say(longer <= 8e-3 and sum(shares) >= 0.95, gap_p99_alone=alone.gap(0.99),
                 gap_p99_beside=both[0].gap(0.99), shares=shares)

    def three(self):
        models = {"one": "qwen3-0.6b", "two": "llama-1b", "three": "bge-large"}
        # The same memory for keys and values, in one place or in two.
        kv = (64 if self.quick else 2048) << 20
        groups = lambda of: [
            (of["one"], CHAT, [prompts("one", 128, self.tokens, seed) for seed in range(8)]),
            (of["two"], CHAT, [prompts("two", 128, self.tokens, 50 + s) for s in range(8)]),
            (of["three"], ENCODE,
             [texts("three", 32 if self.quick else 128, 16, seed) for seed in range(2)]),
        ]

        def figures(servers, seen):
            rate = seen[0].tokens_a_second() + seen[1].tokens_a_second()
            return {"memory": serving.memory_bytes(servers),
                    "tokens_a_second": rate, "texts_a_second": 16 * seen[2].answers_a_second(),
                    "gap_p99": max(seen[0].gap(0.99), seen[1].gap(0.99))}

        with self.server(models, extra=["--config", self.kv_config(2 * kv)]) as server:
            together = figures([server], load(groups(dict.fromkeys(models, server.address)),
                                              self.seconds))
        apart = [self.server({name: shape}, extra=["--config", self.kv_config(kv)])
                 for name, shape in models.items()]
        try:
            for server in apart:
                server.__enter__()
            of = {name: server.address for name, server in zip(models, apart)}
            separate = figures(apart, load(groups(of), self.seconds))
        finally:
            for server in apart:
                server.__exit__()
        ratio = [together[key] / separate[key] for key in ["tokens_a_second", "texts_a_second"]]
        less = separate["memory"] - together["memory"]
        better = together["gap_p99"] < separate["gap_p99"]
        self.say(less > 0 and sum(ratio) / 2 >= 1.15 and better, together=together,
                 separate=separate, throughput_ratios=ratio, memory_less=less)

    def kv_config(self, bytes):
        path = self.args.checkpoints / f"kv-{bytes}.toml"
        path.write_text(f"[scheduler]\nkv_bytes = {bytes}\n")
        return path.resolve()

    def start(self):
        shape = "qwen3-4b"
        weights = self.folder(shape) / "model.safetensors"
        begun = time.perf_counter()
        with weights.open("rb", buffering=0) as file:
            while file.read(1 << 24):
                pass
        read = time.perf_counter() - begun
        seconds = []
        for _ in range(int(self.args.only or 3)):
            with self.server({"model": shape}) as server:
                server.complete("model", [65, 66, 67], 1)
                seconds.append(time.perf_counter() - server.begun)
        best = statistics.median(seconds)
        self.say(best < 5.0, seconds=best, of=seconds, reading_the_file_warm=read)


ROWS = {"decode-1": Bench.decode_1, "decode-64": Bench.decode_64, "embeddings": Bench.embeddings,
        "mixed": Bench.mixed, "three": Bench.three, "start": Bench.start}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("row", choices=ROWS)
    parser.add_argument("checkpoints", type=Path)
    parser.add_argument("--binary", default=serving.default_binary())
    parser.add_argument("--device", default="cuda", help="cuda or cpu")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seconds", type=float, help="of each load")
    parser.add_argument("--only", help="one shape of decode-1, one length of embeddings, "
                        "so many times of start")
    args = parser.parse_args()
    ROWS[args.row](Bench(args))


if __name__ == "__main__":
    main()
