"""Makes smollm2_logprobs.json: log-probabilities by transformers in float32 and by llama.cpp
along the continuations of smollm2_next_token.json."""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from gguf import GGUFReader
from llama_cpp import Llama

from common import made_with, sha256, write_json
from smollm2 import load_model

args = argparse.ArgumentParser(description=__doc__)
args.add_argument("gguf", help="SmolLM2-135M-Instruct.Q4_1.gguf")
args.add_argument("out", type=Path, help="folder to read from and to write to")
args.add_argument("--prompts", type=int, default=6)
args.add_argument("--steps", type=int, default=24, help="most tokens of a continuation")
args = args.parse_args()

torch.set_num_threads(2)
model = load_model(GGUFReader(args.gguf))
llama = Llama(
    model_path=args.gguf, n_ctx=1024, n_batch=1024, n_threads=2, n_threads_batch=2,
    logits_all=True, verbose=False,
)
given = json.loads((args.out / "smollm2_next_token.json").read_text())["prompts"]


def top(logprobs, count=20):
    """Ids and values of the largest, of equals the lower id first."""
    order = np.lexsort((np.arange(len(logprobs)), -logprobs))[:count]
    return order.tolist(), [round(float(logprobs[i]), 4) for i in order]


def log_softmax(logits):
    wide = np.asarray(logits, dtype=np.float64)
    wide = wide - wide.max(axis=1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(axis=1, keepdims=True))


rows, errors = [], []
for case in given[: args.prompts]:
    prompt, answer = case["prompt_ids"], case["continuation_ids"][: args.steps]
    text = prompt + answer[:-1]
    with torch.no_grad():
        ours = log_softmax(model(torch.tensor([text])).logits[0, len(prompt) - 1:].numpy())
    llama.reset()
    llama.eval(text)
    theirs = log_softmax(llama.scores[len(prompt) - 1: len(text)])
    assert len(ours) == len(theirs) == len(answer)
    best = [top(row) for row in ours]
    errors += [abs(theirs[i][j] - ours[i][j]) for i, (ids, _) in enumerate(best) for j in ids]
    rows.append({
        "prompt_ids": prompt,
        "answer_ids": answer,
        "chosen": [round(float(row[id]), 4) for row, id in zip(ours, answer)],
        "llama_cpp_chosen": [round(float(row[id]), 4) for row, id in zip(theirs, answer)],
        "top20_ids": [ids for ids, _ in best],
        "top20": [values for _, values in best],
    })

head = {
    "made_with": made_with("transformers", "torch", "gguf", "llama-cpp-python"),
    "model": Path(args.gguf).name,
    "model_sha256": sha256(args.gguf),
    "llama_cpp_mean_difference": round(float(np.mean(errors)), 4),
    "llama_cpp_largest_difference": round(float(np.max(errors)), 4),
}
write_json(args.out / "smollm2_logprobs.json", head, "prompts", rows)
print(len(errors), "log-probabilities; llama.cpp differs by", np.mean(errors), "at most", max(errors))
