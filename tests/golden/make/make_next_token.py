"""Makes smollm2_next_token.json: greedy continuations by transformers in float32, with
llama.cpp's choice at every position of the same token sequences."""

import argparse
from pathlib import Path

import numpy as np
import torch
from gguf import GGUFReader
from llama_cpp import Llama

from common import LlamaTokenizer, made_with, sha256, write_json
from smollm2 import field, load_model, render
from texts import CHATS

args = argparse.ArgumentParser(description=__doc__)
args.add_argument("gguf", help="SmolLM2-135M-Instruct.Q4_1.gguf")
args.add_argument("out", type=Path, help="folder to write to")
args.add_argument("--steps", type=int, default=64, help="most tokens of a continuation")
args.add_argument("--threads", type=int, default=2)
args = args.parse_args()

torch.set_num_threads(args.threads)
reader = GGUFReader(args.gguf)
model = load_model(reader)
encode = LlamaTokenizer(args.gguf).encode
llama = Llama(
    model_path=args.gguf, n_ctx=1024, n_batch=1024, n_threads=args.threads,
    n_threads_batch=args.threads, logits_all=True, verbose=False,
)
end = field(reader, "tokenizer.ggml.eos_token_id")

rows, total, agree = [], 0, 0
for messages in CHATS:
    text = render(reader, messages)
    prompt = encode(text, True)
    with torch.no_grad():
        output = model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)),
            max_new_tokens=args.steps, do_sample=False, eos_token_id=end, pad_token_id=end,
        )[0].tolist()
        continuation = output[len(prompt):]
        # One pass over the whole sequence; the logits at a token predict the next one.
        logits = model(torch.tensor([output[:-1]])).logits[0, len(prompt) - 1:]
    values, ids = logits.topk(5)
    assert ids[:, 0].tolist() == continuation, messages

    llama.reset()
    llama.eval(output[:-1])
    theirs = np.asarray(llama.scores[len(prompt) - 1:len(output) - 1]).argmax(axis=1).tolist()
    assert len(theirs) == len(continuation)
    total += len(theirs)
    agree += sum(a == b for a, b in zip(theirs, continuation))

    rows.append({
        "messages": messages,
        "rendered": text,
        "prompt_ids": prompt,
        "continuation_ids": continuation,
        "argmax": ids[:, 0].tolist(),
        "margin": [round(a - b, 4) for a, b, *_ in values.tolist()],
        "top5_ids": ids.tolist(),
        "top5_logits": [[round(x, 4) for x in row] for row in values.tolist()],
        "llama_cpp_argmax": theirs,
    })

head = {
    "made_with": made_with("transformers", "torch", "gguf", "llama-cpp-python", "jinja2"),
    "model": Path(args.gguf).name,
    "model_sha256": sha256(args.gguf),
    "positions": total,
    "llama_cpp_agreement": round(agree / total, 4),
}
write_json(args.out / "smollm2_next_token.json", head, "prompts", rows)

print(len(rows), "prompts,", total, "positions; llama.cpp agrees at", agree, f"= {agree / total:.2%}")
for least in (0.05, 0.1, 0.2, 0.5, 1.0):
    kept = [(a, b) for r in rows for m, a, b in zip(r["margin"], r["argmax"], r["llama_cpp_argmax"]) if m >= least]
    print(f"margin >= {least}: {sum(a == b for a, b in kept)} of {len(kept)}")
worst = max(m for r in rows for m, a, b in zip(r["margin"], r["argmax"], r["llama_cpp_argmax"]) if a != b)
print("largest margin at which they differ:", worst)
