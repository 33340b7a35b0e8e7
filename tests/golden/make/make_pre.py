"""Makes pre_cases.json.gz: texts and their token ids under each pre-tokenizer.

llama.cpp, with the Llama 3 vocabulary under the name of another pre-tokenizer: merges reach far
enough that another cut gives other ids. The two tekken-like patterns of llama.cpp are
approximations for its regex engine; there the published pattern is run by the tokenizers library.
"""

import argparse
import gzip
import io
import tempfile
from pathlib import Path

import gguf
from gguf import GGUFReader, GGUFWriter
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from common import LlamaTokenizer, compact, made_with, sha256
from make_vocabs import published_cases
from texts import TOKENISER_TEXTS

NAMES = [
    "default", "gpt-2", "smollm", "falcon", "llama-bpe", "dbrx", "glm4", "qwen2", "qwen35",
    "seed-coder", "deepseek-llm", "deepseek-coder", "deepseek-v3",
]
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def renamed(fields, pre, path):
    writer = GGUFWriter(path, "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(fields["tokenizer.ggml.tokens"].contents())
    writer.add_token_types(fields["tokenizer.ggml.token_type"].contents())
    writer.add_token_merges(fields["tokenizer.ggml.merges"].contents())
    writer.add_bos_token_id(fields["tokenizer.ggml.bos_token_id"].contents())
    writer.add_eos_token_id(fields["tokenizer.ggml.eos_token_id"].contents())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def tekken(fields):
    tokens = fields["tokenizer.ggml.tokens"].contents()
    types = fields["tokenizer.ggml.token_type"].contents()
    vocab = {text: i for i, text in enumerate(tokens) if types[i] != gguf.TokenType.CONTROL}
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"].contents()]
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(TEKKEN), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids


if __name__ == "__main__":
    args = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    args.add_argument("models", type=Path, help="the folder models/ of a llama.cpp source tree")
    args.add_argument("out", type=Path, help="folder to write to")
    args = args.parse_args()
    vocabulary = args.models / "ggml-vocab-llama-bpe.gguf"
    fields = GGUFReader(vocabulary).fields
    texts = [text for text, _ in published_cases(vocabulary)] + TOKENISER_TEXTS
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        for pre in NAMES:
            path = Path(folder) / "vocab.gguf"
            renamed(fields, pre, path)
            encode = LlamaTokenizer(path).encode
            rows[pre] = [encode(text, False) for text in texts]
    encode = tekken(fields)
    rows["tekken"] = [encode(text) for text in texts]
    distinct = len({compact(ids) for ids in rows.values()})
    print(f"{len(texts)} texts, {len(rows)} names, {distinct} different results")
    made = {
        "made_with": made_with("llama-cpp-python", "gguf", "tokenizers"),
        "vocab": vocabulary.name, "vocab_sha256": sha256(vocabulary), "texts": texts, "ids": rows,
    }
    buffer = io.BytesIO()
    with gzip.GzipFile(fileobj=buffer, mode="wb", compresslevel=9, filename="", mtime=0) as out:
        out.write(compact(made).encode("ascii"))
    (args.out / "pre_cases.json.gz").write_bytes(buffer.getvalue())
