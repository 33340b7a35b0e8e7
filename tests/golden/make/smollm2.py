"""SmolLM2 from its GGUF file: float32 weights for transformers, and the chat template."""

import torch
from gguf import GGUFReader, dequantize
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers import LlamaConfig, LlamaForCausalLM

NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def field(reader, name):
    return reader.fields[name].contents()


def render(reader, messages, add_generation_prompt=True):
    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    template = env.from_string(field(reader, "tokenizer.chat_template"))
    return template.render(messages=messages, add_generation_prompt=add_generation_prompt)


def unpermute(weight, heads):
    """GGUF keeps the rotated pairs of a head side by side, transformers half a head apart."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def load_model(reader):
    def hyper(name):
        return field(reader, f"llama.{name}")

    config = LlamaConfig(
        vocab_size=hyper("vocab_size"),
        hidden_size=hyper("embedding_length"),
        intermediate_size=hyper("feed_forward_length"),
        num_hidden_layers=hyper("block_count"),
        num_attention_heads=hyper("attention.head_count"),
        num_key_value_heads=hyper("attention.head_count_kv"),
        max_position_embeddings=hyper("context_length"),
        rms_norm_eps=hyper("attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": hyper("rope.freq_base")},
        tie_word_embeddings=True,
        attn_implementation="eager",
    )
    weights = {}
    for tensor in reader.tensors:
        values = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        parts = tensor.name.split(".")
        if parts[0] == "blk":
            if parts[2] == "attn_q":
                values = unpermute(values, config.num_attention_heads)
            if parts[2] == "attn_k":
                values = unpermute(values, config.num_key_value_heads)
            weights[f"model.layers.{parts[1]}.{NAMES[parts[2]]}.weight"] = values
        else:
            name = {"token_embd": "embed_tokens", "output_norm": "norm"}[parts[0]]
            weights[f"model.{name}.weight"] = values
    model = LlamaForCausalLM(config).float().eval()
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert missing == ["lm_head.weight"] and not unexpected, (missing, unexpected)
    model.tie_weights()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.rope_parameters["rope_theta"] == hyper("rope.freq_base")
    return model
