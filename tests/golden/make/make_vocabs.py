"""Makes vocab_NAME.json.gz and vocab_NAME_cases.json from llama.cpp's test vocabularies.

A merge list is stored as a flat array of pairs (id step, characters on the left):
the id of a merge's result is the previous result's id plus the step (the first is
counted from 0), and the left half of the merge is that many characters of the
result's token text. The token texts are the byte-level ones of the GGUF file.
"""

import argparse
import gzip
import io
from itertools import groupby
from pathlib import Path

from gguf import GGUFReader

from common import LlamaTokenizer, compact, made_with, sha256, write_json
from texts import TOKENISER_TEXTS

SCALARS = ["bos_token_id", "eos_token_id", "add_bos_token", "add_eos_token", "add_space_prefix"]


def pack_merges(tokens, merges):
    ids = {text: i for i, text in enumerate(tokens)}
    flat, last = [], 0
    for merge in merges:
        left, right = merge.split(" ")
        result = ids[left + right]
        flat += [result - last, len(left)]
        last = result
    return flat


def unpack_merges(tokens, flat):
    merges, result = [], 0
    for step, chars in zip(flat[::2], flat[1::2]):
        result += step
        text = tokens[result]
        merges.append(f"{text[:chars]} {text[chars:]}")
    return merges


def pack_scores(scores):
    """Runs of (first score, step to the next, length)."""
    runs = []
    for score in scores:
        if runs and runs[-1][2] == 1:
            runs[-1][1] = score - runs[-1][0]
        if runs and score == runs[-1][0] + runs[-1][1] * runs[-1][2]:
            runs[-1][2] += 1
        else:
            runs.append([score, 0.0, 1])
    assert [a + step * i for a, step, n in runs for i in range(n)] == scores
    return runs


def write_vocab(path, fields):
    tokens = fields["tokenizer.ggml.tokens"].contents()
    field = fields.get("tokenizer.ggml.merges")
    merges = field.contents() if field else []
    packed = pack_merges(tokens, merges)
    assert unpack_merges(tokens, packed) == merges
    types = fields["tokenizer.ggml.token_type"].contents()
    vocab = {
        "model": fields["tokenizer.ggml.model"].contents(),
        "pre": fields["tokenizer.ggml.pre"].contents(),
    }
    for name in SCALARS:
        if field := fields.get(f"tokenizer.ggml.{name}"):
            vocab[name] = field.contents()
    vocab["tokens"] = tokens
    vocab["token_type_runs"] = [[kind, len(list(run))] for kind, run in groupby(types)]
    vocab["merges_packed"] = packed
    if vocab["model"] == "llama":
        vocab["score_runs"] = pack_scores(fields["tokenizer.ggml.scores"].contents())
    buffer = io.BytesIO()
    with gzip.GzipFile(fileobj=buffer, mode="wb", compresslevel=9, filename="", mtime=0) as out:
        out.write(compact(vocab).encode("ascii"))
    path.write_bytes(buffer.getvalue())
    print(f"{path.name}: {len(tokens)} tokens, {len(merges)} merges, {len(buffer.getvalue())} bytes")
    return types


def published_cases(gguf_path):
    """The texts and ids that llama.cpp ships beside the vocabulary."""
    with open(f"{gguf_path}.inp", encoding="utf-8", newline="") as file:
        texts = file.read().split("\n__ggml_vocab_test__\n")[:-1]
    lines = Path(f"{gguf_path}.out").read_text(encoding="ascii").split("\n")
    assert lines.pop() == "" and len(lines) == len(texts), (len(lines), len(texts))
    return [(text, [int(i) for i in line.split()]) for text, line in zip(texts, lines)]


def main():
    args = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    args.add_argument("models", type=Path, help="the folder models/ of a llama.cpp source tree")
    args.add_argument("out", type=Path, help="folder to write to")
    args.add_argument("names", nargs="+", help="for example gpt-2 llama-bpe qwen2")
    args = args.parse_args()

    for name in args.names:
        gguf_path = args.models / f"ggml-vocab-{name}.gguf"
        slug = name.replace("-", "_")
        types = write_vocab(args.out / f"vocab_{slug}.json.gz", GGUFReader(gguf_path).fields)
        tokenizer = LlamaTokenizer(gguf_path)
        encode = tokenizer.encode
        rows = []
        for text, ids in published_cases(gguf_path):
            assert encode(text, False) == ids, (name, text)
            rows.append({"from": "llama.cpp", "text": text, "ids": ids, "ids_special": encode(text, True)})
        published = len(rows)
        for text in TOKENISER_TEXTS:
            ids = encode(text, False)
            rows.append({"from": "texts.py", "text": text, "ids": ids, "ids_special": encode(text, True)})
        head = {
            "made_with": made_with("llama-cpp-python", "gguf"),
            "vocab": gguf_path.name,
            "vocab_sha256": sha256(gguf_path),
            "control_by_name": tokenizer.control_by_name(types),
        }
        write_json(args.out / f"vocab_{slug}_cases.json", head, "cases", rows)
        print(f"{name}: {published} published cases agree, {len(rows)} in all")


if __name__ == "__main__":
    main()
