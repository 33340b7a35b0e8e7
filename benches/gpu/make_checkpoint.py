"""Writes a checkpoint of a real model's shape with random weights: for measuring on a GPU without
fetching anything. The same seed gives the same bytes.

    python benches/gpu/make_checkpoint.py qwen3-0.6b FOLDER [--seed 1] [--layers N]

Needs torch and transformers. The folder holds config.json, model.safetensors (bf16) and a
tokenizer.json of single bytes, so that any text has tokens.
"""

import argparse
import json
import pathlib

SHAPES = {
    # name: (architecture, hidden, layers, heads, KV heads, head size, feed-forward, vocabulary)
    "llama-1b": ("llama", 2048, 16, 32, 8, 64, 8192, 128256),
    "llama-8b": ("llama", 4096, 32, 32, 8, 128, 14336, 128256),
    "qwen3-0.6b": ("qwen3", 1024, 28, 16, 8, 128, 3072, 151936),
    "qwen3-4b": ("qwen3", 2560, 36, 32, 8, 128, 9728, 151936),
    "bge-large": ("bert", 1024, 24, 16, 16, 64, 4096, 30522),
}


def build(shape, layers):
    import transformers

    kind, hidden, depth, heads, kv_heads, head_dim, ff, vocabulary = SHAPES[shape]
    common = dict(
        hidden_size=hidden,
        num_hidden_layers=layers or depth,
        num_attention_heads=heads,
        intermediate_size=ff,
        vocab_size=vocabulary,
    )
    if kind == "bert":
        return transformers.BertModel(transformers.BertConfig(**common), add_pooling_layer=False)
    common.update(
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=8192,
        tie_word_embeddings=kind == "qwen3" or hidden == 2048,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    if kind == "llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**common))
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**common))


def byte_alphabet():
    """The printable stand-ins of bytes that byte-level tokenizers use."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in plain]
    letters = {byte: chr(byte) for byte in plain}
    letters.update({byte: chr(256 + i) for i, byte in enumerate(rest)})
    return [letters[byte] for byte in range(256)]


def tokenizer():
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": level,
        "decoder": level,
        "model": {
            "type": "BPE",
            "vocab": {letter: index for index, letter in enumerate(byte_alphabet())},
            "merges": [],
        },
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--layers", type=int, help="fewer, for a quick look")
    args = parser.parse_args()

    import torch

    torch.manual_seed(args.seed)
    torch.set_default_dtype(torch.bfloat16)
    model = build(args.shape, args.layers)
    args.folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(args.folder, max_shard_size="100GB")
    (args.folder / "tokenizer.json").write_text(json.dumps(tokenizer(), ensure_ascii=False))
    size = (args.folder / "model.safetensors").stat().st_size
    print(f"{args.shape}: {size / 2**20:.0f} MiB in {args.folder}")


if __name__ == "__main__":
    main()
