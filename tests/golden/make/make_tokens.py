"""Makes smollm2_tokens.json: token ids by llama.cpp's tokenizer."""

import argparse
from pathlib import Path

from gguf import GGUFReader

from common import LlamaTokenizer, made_with, sha256, write_json
from texts import TOKENISER_TEXTS

args = argparse.ArgumentParser(description=__doc__)
args.add_argument("gguf", help="SmolLM2-135M-Instruct.Q4_1.gguf")
args.add_argument("out", type=Path, help="folder to write to")
args = args.parse_args()

tokenizer = LlamaTokenizer(args.gguf)
encode = tokenizer.encode
types = GGUFReader(args.gguf).fields["tokenizer.ggml.token_type"].contents()
rows = [
    {"text": text, "ids": encode(text, False), "ids_special": encode(text, True)}
    for text in TOKENISER_TEXTS
]
head = {
    "made_with": made_with("llama-cpp-python"),
    "model": Path(args.gguf).name,
    "model_sha256": sha256(args.gguf),
    "control_by_name": tokenizer.control_by_name(types),
}
write_json(args.out / "smollm2_tokens.json", head, "cases", rows)
print(len(rows), "cases;", sum(r["ids"] != r["ids_special"] for r in rows), "differ with special")
