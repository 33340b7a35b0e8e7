"""Makes minilm_embeddings.json: sentence embeddings by sentence-transformers."""

import argparse
from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer

from common import made_with, sha256, write_json
from texts import EMBEDDING_TEXTS

args = argparse.ArgumentParser(description=__doc__)
args.add_argument("model", type=Path, help="folder with config.json, model.safetensors, tokenizer.json")
args.add_argument("out", type=Path, help="folder to write to")
args = args.parse_args()

torch.set_num_threads(1)
model = SentenceTransformer(str(args.model), device="cpu")
assert model.max_seq_length == 256, model.max_seq_length

# The same tokenizer.json, with its own cut at 128 and padding to 128 taken off.
plain = Tokenizer.from_file(str(args.model / "tokenizer.json"))
plain.no_truncation()
plain.no_padding()

rows, worst_norm, worst_batch = [], 0.0, 0.0
batched = model.encode(EMBEDDING_TEXTS, batch_size=len(EMBEDDING_TEXTS), convert_to_tensor=True)
for text, in_batch in zip(EMBEDDING_TEXTS, batched):
    vector = model.encode([text], batch_size=1, convert_to_tensor=True)[0]
    ids = model.preprocess([text])["input_ids"][0].tolist()
    full = plain.encode(text).ids
    assert ids == (full if len(full) <= 256 else full[:255] + full[-1:]), text
    worst_norm = max(worst_norm, abs(vector.double().norm().item() - 1))
    worst_batch = max(worst_batch, (vector - in_batch).abs().max().item())
    rows.append({
        "text": text,
        "wordpieces": len(full),
        "ids": ids,
        "embedding": [float(f"{x:.7g}") for x in vector.tolist()],
    })

head = {
    "made_with": made_with("sentence-transformers", "transformers", "tokenizers", "torch"),
    "weights_sha256": sha256(args.model / "model.safetensors"),
    "max_seq_length": model.max_seq_length,
}
write_json(args.out / "minilm_embeddings.json", head, "cases", rows)
print(len(rows), "texts; most wordpieces", max(r["wordpieces"] for r in rows))
print(f"norm off 1 by at most {worst_norm:.1e}; alone against in one batch at most {worst_batch:.1e}")
