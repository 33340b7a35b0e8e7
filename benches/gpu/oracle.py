"""Sconce's logits and greedy text beside those of transformers in f32, on the same weights:

    python benches/gpu/oracle.py FOLDER [--binary sconce] [--device cuda] [--batches 1,7,64]
        [--lengths 1,16,128,1024,4096] [--tokens 16]

Both get the same prompts of random bytes, Sconce `batch` of them at once. Log-probabilities of the
five likeliest tokens are compared, which are logits up to a constant; how far they are off is said
relative to the spread of the reference's logits at that position, as an error of the whole row
would be. Random weights leave near ties, where rounding decides: a text counts as the same if it
is so up to the first token whose margin over the second is below `--near` of that spread. Needs
torch and transformers. Ends with status 1 where a bound is missed."""

import argparse
import json
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import serving

ERROR_MAX, SAME_MIN = 2e-2, 0.95


def prompt(length, number):
    return next(serving.prompts("", length, 1, seed=1000 * number + length))["prompt"]


def token_of(text):
    """The id behind a token's text, see `make_checkpoint.tokenizer`; None for single bytes."""
    named = re.fullmatch(r"<([0-9a-f]+)>", text)
    return int(named[1], 16) if named else None


class Reference:
    def __init__(self, folder, device):
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_grad_enabled(False)
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
        self.torch, self.device = torch, device
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.model = model.to(device).eval()

    def greedy(self, tokens, count):
        """For each of `count` tokens: its id, its margin, and the row of log-probabilities, the
        margin relative to the row's spread."""
        torch, cache, found = self.torch, None, []
        given = torch.tensor([tokens], device=self.device)
        for _ in range(count):
            answer = self.model(given, past_key_values=cache, use_cache=True, logits_to_keep=1)
            row, cache = answer.logits[0, -1].double(), answer.past_key_values
            best, spread = row.topk(2), row.std()
            margin = float((best.values[0] - best.values[1]) / spread)
            found.append((int(best.indices[0]), margin, row.log_softmax(-1), float(spread)))
            given = best.indices[:1][None]
        return found


def compare(answer, found, near):
    """Squares of errors, whether the text is the same, and up to where it was looked at."""
    logprobs = answer["choices"][0]["logprobs"]
    errors, same, looked = [], True, 0
    for text, top, (token, margin, row, spread) in zip(
        logprobs["tokens"], logprobs["top_logprobs"], found
    ):
        for name, value in top.items():
            if (other := token_of(name)) is not None:
                errors.append(((value - float(row[other])) / spread) ** 2)
        if margin < near:
            break
        ours = token_of(text)
        if ours is not None and ours != token:
            same = False
            break
        looked += 1
    return errors, same, looked


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--binary", default=serving.default_binary())
    parser.add_argument("--device", default="cuda", help="of both: cuda or cpu")
    parser.add_argument("--batches", default="1,7,64")
    parser.add_argument("--lengths", default="1,16,128,1024,4096")
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--near", type=float, default=0.04)
    parser.add_argument("--seconds", type=float, default=480.0, help="then no more prompts")
    args = parser.parse_args()

    begun = time.perf_counter()
    lengths = [int(length) for length in args.lengths.split(",")]
    batches = [int(batch) for batch in args.batches.split(",")]
    reference = Reference(args.folder, args.device)
    wanted = {}
    for number in range(max(batches)):
        length = lengths[number % len(lengths)]
        if time.perf_counter() - begun > args.seconds / 2:
            break
        tokens = prompt(length, number)
        wanted[number] = (tokens, reference.greedy(tokens, args.tokens))
    missed = False
    with serving.Server(args.binary, args.device, {"model": args.folder}) as server:
        for batch in batches:
            numbers = [number for number in range(batch) if number in wanted]
            ask = lambda number: server.complete(
                "model", wanted[number][0], args.tokens, logprobs=5
            )
            with ThreadPoolExecutor(len(numbers)) as pool:
                answers = list(pool.map(ask, numbers))
            results = [
                compare(answer, wanted[number][1], args.near)
                for number, answer in zip(numbers, answers)
            ]
            errors = [error for result in results for error in result[0]]
            error = (sum(errors) / len(errors)) ** 0.5
            same = sum(result[1] for result in results) / len(results)
            missed |= error > ERROR_MAX or same < SAME_MIN
            print(json.dumps({
                "row": "oracle", "model": args.folder.name, "batch": batch,
                "prompts": len(numbers), "relative_error": round(error, 5),
                "same_text": round(same, 4), "values": len(errors),
                "tokens_looked_at": sum(result[2] for result in results),
            }), flush=True)
    sys.exit(missed)


if __name__ == "__main__":
    main()
