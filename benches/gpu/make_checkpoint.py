"""Writes a checkpoint of a real model's shape with random weights: for measuring on a GPU without
fetching anything. The same seed gives the same bytes on the same machine.

    python benches/gpu/make_checkpoint.py qwen3-0.6b FOLDER [--seed 1] [--layers N] [--device cuda]

Needs torch alone. The folder holds config.json, model.safetensors (bf16) and a tokenizer.json that
knows single bytes, and a text of its own for each other id, so that any text has tokens and any
tokens have a text."""

import argparse
import json
import pathlib
import struct

SHAPES = {
    # name: (architecture, hidden, layers, heads, KV heads, head size, feed-forward, vocabulary)
    "llama-1b": ("llama", 2048, 16, 32, 8, 64, 8192, 128256),
    "llama-8b": ("llama", 4096, 32, 32, 8, 128, 14336, 128256),
    "qwen3-0.6b": ("qwen3", 1024, 28, 16, 8, 128, 3072, 151936),
    "qwen3-4b": ("qwen3", 2560, 36, 32, 8, 128, 9728, 151936),
    "bge-large": ("bert", 1024, 24, 16, 16, 64, 4096, 30522),
    # For trying the scripts out.
    "tiny-llama": ("llama", 64, 2, 4, 2, 16, 96, 512),
    "tiny-qwen3": ("qwen3", 64, 2, 4, 2, 32, 96, 512),
    "tiny-bert": ("bert", 64, 2, 4, 4, 16, 96, 512),
}
TIED = {"llama-1b", "qwen3-0.6b", "qwen3-4b", "tiny-qwen3"}
CONTEXT = {"llama": 8192, "qwen3": 8192, "bert": 512}


def config(shape, layers):
    kind, hidden, depth, heads, kv_heads, head_dim, ff, vocabulary = SHAPES[shape]
    common = {
        "model_type": kind,
        "hidden_size": hidden,
        "num_hidden_layers": layers or depth,
        "num_attention_heads": heads,
        "intermediate_size": ff,
        "vocab_size": vocabulary,
        "max_position_embeddings": CONTEXT[kind],
        "torch_dtype": "bfloat16",
    }
    if kind == "bert":
        names = {"architectures": ["BertModel"], "hidden_act": "gelu", "layer_norm_eps": 1e-12}
        return common | names | {"type_vocab_size": 2, "pad_token_id": 0}
    return common | {
        "architectures": ["LlamaForCausalLM" if kind == "llama" else "Qwen3ForCausalLM"],
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 500000.0 if kind == "llama" else 1000000.0,
        "tie_word_embeddings": shape in TIED,
        "attention_bias": False,
    }


def tensors(shape, layers):
    """Names and sizes, in the order of the file."""
    kind, hidden, depth, heads, kv_heads, head_dim, ff, vocabulary = SHAPES[shape]
    depth = layers or depth
    if kind == "bert":
        yield "embeddings.word_embeddings.weight", (vocabulary, hidden)
        yield "embeddings.position_embeddings.weight", (CONTEXT[kind], hidden)
        yield "embeddings.token_type_embeddings.weight", (2, hidden)
        yield from norm("embeddings.LayerNorm", hidden)
        for i in range(depth):
            at = f"encoder.layer.{i}"
            for part in ["query", "key", "value"]:
                yield from dense(f"{at}.attention.self.{part}", hidden, hidden)
            yield from dense(f"{at}.attention.output.dense", hidden, hidden)
            yield from norm(f"{at}.attention.output.LayerNorm", hidden)
            yield from dense(f"{at}.intermediate.dense", ff, hidden)
            yield from dense(f"{at}.output.dense", hidden, ff)
            yield from norm(f"{at}.output.LayerNorm", hidden)
        return
    yield "model.embed_tokens.weight", (vocabulary, hidden)
    for i in range(depth):
        at = f"model.layers.{i}"
        yield f"{at}.input_layernorm.weight", (hidden,)
        yield f"{at}.self_attn.q_proj.weight", (heads * head_dim, hidden)
        yield f"{at}.self_attn.k_proj.weight", (kv_heads * head_dim, hidden)
        yield f"{at}.self_attn.v_proj.weight", (kv_heads * head_dim, hidden)
        if kind == "qwen3":
            yield f"{at}.self_attn.q_norm.weight", (head_dim,)
            yield f"{at}.self_attn.k_norm.weight", (head_dim,)
        yield f"{at}.self_attn.o_proj.weight", (hidden, heads * head_dim)
        yield f"{at}.post_attention_layernorm.weight", (hidden,)
        yield f"{at}.mlp.gate_proj.weight", (ff, hidden)
        yield f"{at}.mlp.up_proj.weight", (ff, hidden)
        yield f"{at}.mlp.down_proj.weight", (hidden, ff)
    yield "model.norm.weight", (hidden,)
    if shape not in TIED:
        yield "lm_head.weight", (vocabulary, hidden)


def dense(name, rows, columns):
    yield f"{name}.weight", (rows, columns)
    yield f"{name}.bias", (rows,)


def norm(name, width):
    yield f"{name}.weight", (width,)
    yield f"{name}.bias", (width,)


def values(name, size, generator, device):
    """Matrices keep the size of what goes through them, scales are about one."""
    import torch

    noise = torch.empty(size, device=device, dtype=torch.float32).normal_(generator=generator)
    if name.endswith("bias"):
        noise *= 0.1
    elif len(size) == 1:
        noise = 1.0 + 0.1 * noise
    elif "embed" in name and "embed_tokens" not in name:
        pass
    else:
        noise *= size[1] ** -0.5
    return noise.to(torch.bfloat16).cpu().contiguous()


def write_weights(path, shape, layers, seed, device):
    """A safetensors file, one tensor in memory at a time."""
    import torch

    header, end = {}, 0
    for name, size in tensors(shape, layers):
        count = 2 * size[0] * (size[1] if len(size) == 2 else 1)
        header[name] = {"dtype": "BF16", "shape": size, "data_offsets": [end, end + count]}
        end += count
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    generator = torch.Generator(device=device).manual_seed(seed)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(head)) + head)
        for name, size in tensors(shape, layers):
            tensor = values(name, size, generator, device)
            file.write(memoryview(tensor.view(torch.uint8).numpy()).cast("B"))


def byte_alphabet():
    """The printable stand-ins of bytes that byte-level tokenizers use."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in plain]
    letters = {byte: chr(byte) for byte in plain}
    letters.update({byte: chr(256 + i) for i, byte in enumerate(rest)})
    return [letters[byte] for byte in range(256)]


def tokenizer(vocabulary):
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
             "use_regex": False}
    names = byte_alphabet() + [f"<{token:x}>" for token in range(256, vocabulary)]
    return {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": level,
        "decoder": level,
        "model": {
            "type": "BPE",
            "vocab": {name: token for token, name in enumerate(names)},
            "merges": [],
        },
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--layers", type=int, help="fewer, for a quick look")
    parser.add_argument("--device", default="cpu", help="where numbers are drawn: cuda is faster")
    args = parser.parse_args()

    args.folder.mkdir(parents=True, exist_ok=True)
    write_weights(args.folder / "model.safetensors", args.shape, args.layers, args.seed,
                  args.device)
    described = config(args.shape, args.layers)
    (args.folder / "config.json").write_text(json.dumps(described, indent=1))
    words = json.dumps(tokenizer(described["vocab_size"]), ensure_ascii=False)
    (args.folder / "tokenizer.json").write_text(words)
    size = (args.folder / "model.safetensors").stat().st_size
    print(f"{args.shape}: {size / 2**20:.0f} MiB in {args.folder}")


if __name__ == "__main__":
    main()
