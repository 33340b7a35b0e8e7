"""Makes smollm2_perplexity.json: how likely transformers in float32 and llama.cpp find a text, in
windows of which the second half counts, as in llama.cpp's own perplexity tool."""

import argparse
from pathlib import Path

import numpy as np
import torch
from gguf import GGUFReader
from llama_cpp import Llama

from common import LlamaTokenizer, made_with, sha256, write_json
from smollm2 import load_model

args = argparse.ArgumentParser(description=__doc__)
args.add_argument("gguf", help="SmolLM2-135M-Instruct.Q4_1.gguf")
args.add_argument("out", type=Path, help="folder to write to")
args.add_argument("text", type=Path, nargs="+", help="any text, such as ARCHITECTURE.md")
args.add_argument("--window", type=int, default=512, help="tokens")
args.add_argument("--windows", type=int, default=6)
args = args.parse_args()

torch.set_num_threads(2)
model = load_model(GGUFReader(args.gguf))
llama = Llama(
    model_path=args.gguf, n_ctx=args.window, n_batch=args.window, n_threads=2, n_threads_batch=2,
    logits_all=True, verbose=False,
)


def surprise(logits, ids):
    """The negative log-likelihood of each token of the second half."""
    half = len(ids) // 2
    wide = np.asarray(logits, dtype=np.float64)[half - 1 : -1]
    wide = wide - wide.max(axis=1, keepdims=True)
    logprobs = wide - np.log(np.exp(wide).sum(axis=1, keepdims=True))
    return -logprobs[np.arange(half), ids[half:]]


text = "\n".join(path.read_text(encoding="utf-8") for path in args.text)
ids = LlamaTokenizer(args.gguf).encode(text, special=False)
rows, oracle, theirs = [], [], []
for start in range(0, args.windows * args.window, args.window):
    window = ids[start : start + args.window]
    assert len(window) == args.window, "the text is too short"
    with torch.no_grad():
        exact = surprise(model(torch.tensor([window])).logits[0].numpy(), window)
    llama.reset()
    llama.eval(window)
    other = surprise(llama.scores, window)
    oracle.append(exact)
    theirs.append(other)
    rows.append({"ids": window})

head = {
    "made_with": made_with("transformers", "torch", "gguf", "llama-cpp-python"),
    "model": Path(args.gguf).name,
    "model_sha256": sha256(args.gguf),
    "perplexity": round(float(np.exp(np.mean(oracle))), 5),
    "llama_cpp_perplexity": round(float(np.exp(np.mean(theirs))), 5),
}
write_json(args.out / "smollm2_perplexity.json", head, "windows", rows)
print(np.size(oracle), "tokens:", head["perplexity"], "llama.cpp", head["llama_cpp_perplexity"])
