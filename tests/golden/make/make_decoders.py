"""Makes decoders.json: small decoders with made-up weights, run by transformers and llama.cpp.

Weights are a function of the tensor's name (see `noise`), rounded to bfloat16, so that the test
can write the same checkpoint without its being committed.
"""

import argparse
import tempfile
from pathlib import Path

import gguf
import numpy as np
import torch
from llama_cpp import llama_cpp as c
from transformers import (
    LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, Qwen2Config,
    Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM, SmolLM3Config, SmolLM3ForCausalLM,
)

from common import compact, made_with, write_json

VOCAB, LENGTH, NEW = 160, 40, 12
SIZES = dict(
    vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
    rms_norm_eps=1e-5, bos_token_id=None, eos_token_id=None, pad_token_id=None,
)
LLAMA3 = dict(
    rope_type="llama3", rope_theta=500000.0, factor=8.0, low_freq_factor=1.0,
    high_freq_factor=4.0, original_max_position_embeddings=32,
)
PLAIN = dict(rope_type="default", rope_theta=10000.0)
# Name, format of the weights, files, configuration.
CASES = [
    ("llama", "F32", 1, LlamaConfig(**SIZES, rope_parameters=PLAIN, tie_word_embeddings=False)),
    ("llama_tied_multihead", "BF16", 1, LlamaConfig(
        **{**SIZES, "num_key_value_heads": 4}, rope_parameters=PLAIN, tie_word_embeddings=True)),
    ("llama_rope_llama3", "F16", 3, LlamaConfig(
        **SIZES, rope_parameters=LLAMA3, tie_word_embeddings=True)),
    ("llama_rope_linear_biases", "F32", 2, LlamaConfig(
        **SIZES, rope_parameters=dict(PLAIN, rope_type="linear", factor=4.0),
        attention_bias=True, mlp_bias=True, tie_word_embeddings=False)),
    ("mistral_head_dim", "BF16", 1, MistralConfig(
        **SIZES, head_dim=32, rope_parameters=dict(PLAIN, rope_theta=1e6), sliding_window=None,
        tie_word_embeddings=False)),
    ("qwen2", "BF16", 1, Qwen2Config(
        **SIZES, rope_parameters=dict(PLAIN, rope_theta=1e6), tie_word_embeddings=True)),
    ("qwen3", "F16", 1, Qwen3Config(
        **SIZES, head_dim=32, rope_parameters=dict(PLAIN, rope_theta=1e6),
        tie_word_embeddings=True)),
    ("smollm3", "BF16", 1, SmolLM3Config(
        **{**SIZES, "num_hidden_layers": 5}, rope_parameters=dict(PLAIN, rope_theta=5e6),
        tie_word_embeddings=True, use_sliding_window=False)),
]
MODELS = dict(
    llama=LlamaForCausalLM, mistral=MistralForCausalLM, qwen2=Qwen2ForCausalLM,
    qwen3=Qwen3ForCausalLM, smollm3=SmolLM3ForCausalLM,
)
GGUF_NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def noise(name, count):
    """Values in -1..1 that depend on the name alone."""
    seed = 0xCBF29CE484222325
    for byte in name.encode():
        seed = (seed ^ byte) * 0x100000001B3 % 2**64
    with np.errstate(over="ignore"):
        x = np.uint64(seed) + np.arange(count, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (x >> np.uint64(40)).astype(np.float32) / np.float32(1 << 23) - np.float32(1)


def weight(name, shape):
    values = torch.from_numpy(noise(name, int(np.prod(shape)))).reshape(shape)
    if len(shape) > 1:
        values = values * np.float32(1.7 / np.sqrt(shape[-1]))
    elif name.endswith("bias"):
        values = values * np.float32(0.25)
    else:
        values = 1 + values * np.float32(0.25)
    return values.to(torch.bfloat16).float()


def build(config):
    with torch.device("meta"):
        model = MODELS[config.model_type](config)
    config._attn_implementation = "eager"
    names = {name: list(t.shape) for name, t in model.state_dict().items()}
    if config.tie_word_embeddings:
        names.pop("lm_head.weight", None)
    model = MODELS[config.model_type](config).float().eval()
    weights = {name: weight(name, shape) for name, shape in names.items()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert set(missing) <= {"lm_head.weight"} and not unexpected, (missing, unexpected)
    model.tie_weights()
    return model, names, weights


def numbers(values):
    return [float(f"{value:.6g}") for value in values]


def transformers_rows(model, tokens):
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0].numpy()
        known = list(tokens)
        margins = []
        for _ in range(NEW):
            last = model(torch.tensor([known])).logits[0, -1]
            best = torch.topk(last, 2)
            margins.append((best.values[0] - best.values[1]).item())
            known.append(best.indices[0].item())
    return logits, known[len(tokens):], margins


def gguf_name(name):
    stem, ending = name.rsplit(".", 1)
    if stem.startswith("model.layers."):
        _, _, index, part = stem.split(".", 3)
        return f"blk.{index}.{GGUF_NAMES[part]}.{ending}"
    return f"{GGUF_NAMES[stem]}.{ending}"


def interleave(values, heads):
    """Half-a-head-apart pairs put side by side, as GGUF's Llama has them."""
    rest = values.shape[1:]
    return values.reshape(heads, 2, -1, *rest).swapaxes(1, 2).reshape(values.shape)


def write_gguf(path, config, weights):
    arch = {"mistral": "llama"}.get(config.model_type, config.model_type)
    writer = gguf.GGUFWriter(path, arch)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_factors(rope, head_dim))
    writer.add_vocab_size(VOCAB)
    writer.add_tokenizer_model("no_vocab")
    for name, values in weights.items():
        values = values.numpy()
        part = name.rsplit(".", 2)[-2]
        if arch in ("llama", "smollm3") and part in ("q_proj", "k_proj"):
            heads = config.num_attention_heads if part == "q_proj" else config.num_key_value_heads
            values = interleave(values, heads)
        writer.add_tensor(gguf_name(name), np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama3_factors(rope, head_dim):
    base, original = rope["rope_theta"], rope["original_max_position_embeddings"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    factors = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * np.pi * base ** (i / head_dim)
        smooth = np.clip((original / wavelength - low) / (high - low), 0, 1)
        factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(factors, dtype=np.float32)


def llama_cpp_rows(path, tokens):
    params = c.llama_model_default_params()
    model = c.llama_model_load_from_file(str(path).encode(), params)
    assert model, path
    params = c.llama_context_default_params()
    params.n_ctx, params.n_batch, params.type_k, params.type_v = 64, 64, 0, 0
    params.flash_attn_type = 0
    context = c.llama_init_from_model(model, params)
    batch = c.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for i, token in enumerate(tokens):
        batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, i, 1
        batch.seq_id[i][0], batch.logits[i] = 0, 1
    assert c.llama_decode(context, batch) == 0
    rows = [np.ctypeslib.as_array(c.llama_get_logits_ith(context, i), (VOCAB,)).copy()
            for i in range(len(tokens))]
    c.llama_batch_free(batch)
    c.llama_free(context)
    c.llama_model_free(model)
    return np.array(rows)


args = argparse.ArgumentParser(description=__doc__.splitlines()[0])
args.add_argument("out", type=Path, help="folder to write to")
args = args.parse_args()
torch.set_num_threads(2)
c.llama_backend_init()

rows = []
for name, dtype, files, config in CASES:
    model, names, weights = build(config)
    tokens = [(i * 37 + i * i) % VOCAB for i in range(LENGTH)]
    logits, continuation, margins = transformers_rows(model, tokens)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        write_gguf(path, config, weights)
        theirs = llama_cpp_rows(path, tokens)
    peak = np.abs(logits).max()
    apart = np.abs(logits - theirs).max() / peak
    assert apart < 2e-3, (name, apart)
    given = {k: v for k, v in config.to_dict().items() if v is not None and not k.startswith("_")}
    keep = set(SIZES) | {
        "model_type", "head_dim", "rope_parameters", "tie_word_embeddings", "sliding_window",
        "use_sliding_window", "no_rope_layers", "hidden_act", "attention_bias", "mlp_bias",
    }
    given = {k: v for k, v in given.items() if k in keep}
    given.setdefault("sliding_window", None)
    if name == "llama_rope_llama3":
        # As configurations were written before transformers 5.
        scaling = given.pop("rope_parameters")
        given["rope_theta"] = scaling.pop("rope_theta")
        given["rope_scaling"] = scaling
    factors = []
    if config.rope_parameters["rope_type"] == "llama3":
        head_dim = config.hidden_size // config.num_attention_heads
        factors = numbers(llama3_factors(config.rope_parameters, head_dim))
    rows.append({
        "name": name, "format": dtype, "files": files, "config": given, "tensors": names,
        "rope_factors": factors, "tokens": tokens, "logits_at": [0, 17, 31, 39],
        "logits": [numbers(logits[i]) for i in (0, 17, 31, 39)],
        "llama_cpp_apart": float(f"{apart:.2g}"),
        "continuation": continuation, "margins": numbers(margins),
    })
    print(f"{name}: peak {peak:.3g}, llama.cpp apart {apart:.2g}, margins {min(margins):.3g}")

head = {"made_with": made_with("transformers", "torch", "llama-cpp-python", "gguf")}
write_json(args.out / "decoders.json", head, "cases", rows)
