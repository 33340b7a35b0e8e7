"""Helpers shared by the golden-data scripts."""

import hashlib
import json
from importlib.metadata import version

import llama_cpp
from llama_cpp import Llama


def sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def made_with(*packages):
    return {name: version(name) for name in packages}


def compact(value):
    return json.dumps(value, ensure_ascii=True, separators=(",", ":"))


def write_json(path, head, key, rows):
    """Writes one object: the pairs of `head`, then `key` with one row a line."""
    with open(path, "w", encoding="ascii", newline="\n") as out:
        out.write("{\n")
        for name, value in head.items():
            out.write(f"{compact(name)}:{compact(value)},\n")
        out.write(f"{compact(key)}:[\n")
        out.write(",\n".join(compact(row) for row in rows))
        out.write("\n]}\n")


class LlamaTokenizer:
    """llama.cpp's tokenizer for one GGUF file."""

    def __init__(self, gguf_path):
        self.llama = Llama(model_path=str(gguf_path), vocab_only=True, verbose=False)

    def encode(self, text, special):
        if not text:
            return []
        return self.llama.tokenize(text.encode("utf-8"), add_bos=False, special=special)

    def control_by_name(self, types):
        """Tokens that llama.cpp makes control tokens for their text (such as "</s>"),
        although the file says that they are normal ones; `types` is the file's list."""
        vocab = llama_cpp.llama_model_get_vocab(self.llama.model)
        return [
            [i, llama_cpp.llama_vocab_get_text(vocab, i).decode("utf-8")]
            for i, kind in enumerate(types)
            if kind == 1 and llama_cpp.llama_vocab_is_control(vocab, i)
        ]
