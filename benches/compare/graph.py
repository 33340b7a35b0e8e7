"""MiniLM (BERT) as an ONNX graph, built from its safetensors with ONNX Runtime's own fused
operators, as its transformer optimiser would leave it: Attention, SkipLayerNormalization,
BiasGelu, EmbedLayerNormalization. The int8 variant is its dynamic quantisation."""

import json
from pathlib import Path

import numpy
import onnx
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import load_file

FUSED = "com.microsoft"


class Graph:
    """Nodes and weights, in order."""

    def __init__(self, tensors):
        self.tensors, self.nodes, self.weights = tensors, [], []

    def weight(self, name, value):
        value = numpy.ascontiguousarray(value)
        self.weights.append(numpy_helper.from_array(value, name))
        return name

    def node(self, kind, inputs, output, domain="", **attributes):
        outputs = [output] if isinstance(output, str) else output
        node = helper.make_node(kind, inputs, outputs, domain=domain, **attributes)
        self.nodes.append(node)
        return outputs[0]

    def dense(self, name, x, source):
        """A matrix without its bias."""
        weight = self.weight(f"{name}.weight", self.tensors[f"{source}.weight"].T)
        return self.node("MatMul", [x, weight], f"{name}.product")

    def bias(self, name, source):
        return self.weight(f"{name}.bias", self.tensors[f"{source}.bias"])

    def norm(self, name, x, residual, bias, source, eps):
        scale = self.weight(f"{name}.scale", self.tensors[f"{source}.weight"])
        shift = self.weight(f"{name}.shift", self.tensors[f"{source}.bias"])
        inputs = [x, residual, scale, shift, bias]
        return self.node("SkipLayerNormalization", inputs, f"{name}.out", FUSED, epsilon=eps)


def export(folder, cache, dynamic):
    """Path of the model's graph in `cache`, made on first use."""
    plain, quantised = cache / "minilm.onnx", cache / "minilm.int8.onnx"
    if not plain.exists():
        build(Path(folder), plain)
    if dynamic and not quantised.exists():
        from onnxruntime.quantization import QuantType, quantize_dynamic

        options = {"DefaultTensorType": TensorProto.FLOAT}
        quantize_dynamic(str(plain), str(quantised), weight_type=QuantType.QInt8, extra_options=options)
    return quantised if dynamic else plain


def build(folder, path):
    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    graph, eps = Graph(tensors), config["layer_norm_eps"]
    heads = config["num_attention_heads"]
    embedding = "embeddings"
    names = ["word_embeddings", "position_embeddings", "token_type_embeddings"]
    tables = [graph.weight(name, tensors[f"{embedding}.{name}.weight"]) for name in names]
    graph.node("Cast", ["input_ids"], "ids", to=TensorProto.INT32)
    graph.node("Cast", ["attention_mask"], "mask", to=TensorProto.INT32)
    graph.node("Sub", ["ids", "ids"], "types")
    norm = [
        graph.weight("embed.scale", tensors[f"{embedding}.LayerNorm.weight"]),
        graph.weight("embed.shift", tensors[f"{embedding}.LayerNorm.bias"]),
    ]
    inputs = ["ids", "types", *tables, *norm, "mask"]
    x = graph.node("EmbedLayerNormalization", inputs, ["embed.out", "lengths"], FUSED, epsilon=eps)
    for index in range(config["num_hidden_layers"]):
        x = layer(graph, index, x, heads, eps)
    graph.node("Identity", [x], "hidden")
    shape = ["batch", "tokens"]
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.INT64, shape)
        for name in ["input_ids", "attention_mask"]
    ]
    output = helper.make_tensor_value_info("hidden", TensorProto.FLOAT, [*shape, None])
    whole = helper.make_graph(graph.nodes, "minilm", inputs, [output], graph.weights)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid(FUSED, 1)]
    onnx.save(helper.make_model(whole, opset_imports=opsets, ir_version=8), path)


def layer(graph, index, x, heads, eps):
    source, name = f"encoder.layer.{index}", f"l{index}"
    parts = [f"{source}.attention.self.{part}" for part in ["query", "key", "value"]]
    qkv = numpy.concatenate([graph.tensors[f"{part}.weight"].T for part in parts], axis=1)
    shift = numpy.concatenate([graph.tensors[f"{part}.bias"] for part in parts])
    inputs = [x, graph.weight(f"{name}.qkv", qkv), graph.weight(f"{name}.qkv.bias", shift), "lengths"]
    mixed = graph.node("Attention", inputs, f"{name}.attention", FUSED, num_heads=heads)
    product = graph.dense(f"{name}.output", mixed, f"{source}.attention.output.dense")
    bias = graph.bias(f"{name}.output", f"{source}.attention.output.dense")
    inner = f"{source}.attention.output.LayerNorm"
    x = graph.norm(f"{name}.norm", product, x, bias, inner, eps)
    wide = graph.dense(f"{name}.up", x, f"{source}.intermediate.dense")
    bias = graph.bias(f"{name}.up", f"{source}.intermediate.dense")
    wide = graph.node("BiasGelu", [wide, bias], f"{name}.gelu", FUSED)
    product = graph.dense(f"{name}.down", wide, f"{source}.output.dense")
    bias = graph.bias(f"{name}.down", f"{source}.output.dense")
    return graph.norm(f"{name}.norm2", product, x, bias, f"{source}.output.LayerNorm", eps)
