"""Makes encoders/: small encoders with made-up weights, and what transformers answers with them.

The weights are not kept: they are drawn by a formula from each tensor's name and index, here and in
tests/it/encoders.rs. Kept are config.json, tokenizer.json, the tensors' names and shapes, and the
answers.
"""

import argparse
import json
from pathlib import Path

import numpy
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    BertConfig,
    DistilBertConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
    XLMRobertaConfig,
)

from common import compact, made_with

WORDS = (
    "a the small lamp wall bracket for candles holds light of what is sconce ship sea bright "
    "dark iron glass stone house night day burn ##s ##ing ##ed un ##likely . , ? ! - 1 2 3"
).split()
LETTERS = "abcdefghijklmnopqrstuvwxyz"

TEXTS = [
    "a small lamp",
    "The wall bracket holds candles.",
    "what is a sconce?",
    "Unlikely ships burning at night, 123!",
    "x",
    "the sea is dark, the house is bright - the lamp of glass burns by day and by night " * 2,
]
PAIRS = [
    ("what is a sconce?", "A wall bracket for candles."),
    ("what is a sconce?", "The sea is dark."),
    ("lamp", "a small lamp of iron and glass " * 4),
    ("the ship of stone " * 4, "sea"),
    ("Zürich", "naïve café"),
]


def noise(name, count):
    """Values in -1..1 that depend on the name and the index alone."""
    seed = 0xCBF29CE484222325
    for byte in name.encode():
        seed = ((seed ^ byte) * 0x100000001B3) % 2**64
    x = numpy.uint64(seed) + numpy.arange(count, dtype=numpy.uint64) * numpy.uint64(
        0x9E3779B97F4A7C15
    )
    x = (x ^ (x >> numpy.uint64(30))) * numpy.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> numpy.uint64(27))) * numpy.uint64(0x94D049BB133111EB)
    return (x >> numpy.uint64(40)).astype(numpy.float32) / numpy.float32(1 << 23) - 1


def fill(model):
    """Weights by formula; the list of names and shapes in the file."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point():
            continue
        values = noise(name, tensor.numel())
        if tensor.dim() == 2:
            columns = tensor.shape[1]
            # Embeddings of size 1, matrices that keep the size of what goes through them.
            scale = 1.0 if "embeddings" in name else 2.5 / columns**0.5
            values = values * numpy.float32(scale)
        elif name.endswith("LayerNorm.weight") or name.endswith("layer_norm.weight"):
            values = 1 + numpy.float32(0.2) * values
        else:
            values = numpy.float32(0.1) * values
        with torch.no_grad():
            tensor.copy_(torch.from_numpy(values).reshape(tensor.shape))
        tensors[name] = list(tensor.shape)
    return tensors


def wordpiece():
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    vocabulary += [x for x in LETTERS if x not in WORDS] + [f"##{x}" for x in LETTERS]
    vocabulary = {text: index for index, text in enumerate(dict.fromkeys(vocabulary))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
    return tokenizer


def unigram():
    pieces = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    words = [word for word in WORDS if word.isalpha()]
    pieces += [(f"▁{word}", -3.0 - 0.01 * i) for i, word in enumerate(words)]
    pieces += [("▁", -4.0), ("s", -5.0), ("ing", -5.1), ("un", -5.2), ("likely", -5.3)]
    pieces += [(x, -7.0 - 0.01 * i) for i, x in enumerate(LETTERS + "TUAZ.,?!-123") if x != "s"]
    pieces += [("<mask>", 0.0)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=3, byte_fallback=False))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace(" {2,}", " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> </s> $B </s>",
        special_tokens=[("<s>", 0), ("</s>", 2)],
    )
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.add_special_tokens(["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    return tokenizer


SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
BERT = {**SIZES, "intermediate_size": 96, "max_position_embeddings": 48}
ROBERTA = {**BERT, "max_position_embeddings": 50, "type_vocab_size": 1}
DISTILBERT = {"dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 96, "max_position_embeddings": 48}
LIMIT = 48


def labelled(*names):
    return {"id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)}}


MODELS = {
    "bert_embed": (BertConfig, BERT, None, wordpiece),
    "bert_rerank": (BertConfig, BERT, ["LABEL_0"], wordpiece),
    "bert_classify": (BertConfig, BERT, ["calm", "glad", "sad"], wordpiece),
    "xlm_roberta_embed": (XLMRobertaConfig, ROBERTA, None, unigram),
    "xlm_roberta_rerank": (XLMRobertaConfig, ROBERTA, ["LABEL_0"], unigram),
    "roberta_classify": (RobertaConfig, ROBERTA, ["no", "yes"], unigram),
    "distilbert_embed": (DistilBertConfig, DISTILBERT, None, wordpiece),
    "distilbert_classify": (DistilBertConfig, DISTILBERT, ["NEGATIVE", "POSITIVE"], wordpiece),
}


def rounded(values):
    return [float(f"{x:.6g}") for x in values]


def answers(model, config, tokenizer, labels):
    specials = dict(zip(["pad_token", "unk_token"], ["[PAD]", "[UNK]"]))
    if tokenizer.token_to_id("<pad>") is not None:
        specials = dict(zip(["pad_token", "unk_token"], ["<pad>", "<unk>"]))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        **specials,
    )
    cases = []
    for text in [*TEXTS, *PAIRS] if labels else TEXTS:
        texts = list(text) if isinstance(text, tuple) else [text]
        cut = fast(*texts, truncation="longest_first", max_length=LIMIT, return_tensors="pt")
        whole = fast(*texts)["input_ids"]
        inputs = {"input_ids": cut["input_ids"], "attention_mask": cut["attention_mask"]}
        types = cut["token_type_ids"]
        if config.model_type == "bert":
            inputs["token_type_ids"] = types
        with torch.no_grad():
            output = model(**inputs)
        case = {"texts": texts, "tokens": len(whole), "ids": cut["input_ids"][0].tolist()}
        if config.model_type == "bert" and types.any():
            case["second"] = types[0].tolist().index(1)
        if labels:
            case["scores"] = rounded(output.logits[0].tolist())
        else:
            states = output.last_hidden_state[0]
            case["mean"] = rounded(states.mean(0).tolist())
            case["cls"] = rounded(states[0].tolist())
            case["last_token"] = rounded(states[-1].tolist())
        cases.append(case)
    return cases


def main():
    args = argparse.ArgumentParser(description=__doc__)
    args.add_argument("out", type=Path, help="folder to write to")
    args = args.parse_args()
    out = args.out / "encoders"
    out.mkdir(exist_ok=True)
    torch.set_num_threads(1)
    for name, (kind, sizes, labels, vocabulary) in MODELS.items():
        tokenizer = vocabulary()
        pad = 1 if vocabulary is unigram else 0
        config = kind(
            vocab_size=tokenizer.get_vocab_size(), pad_token_id=pad, **sizes,
            **(labelled(*labels) if labels else {}),
        )
        factory = AutoModelForSequenceClassification if labels else AutoModel
        model = factory.from_config(config, attn_implementation="eager").eval()
        tensors = fill(model)
        config.architectures = [type(model).__name__]
        tokenizer.save(str(out / f"{vocabulary.__name__}.json"))
        head = {
            "made_with": made_with("transformers", "tokenizers", "torch"),
            "tokenizer": f"{vocabulary.__name__}.json",
            "limit": LIMIT,
            "config": json.loads(config.to_json_string()),
            "tensors": tensors,
        }
        cases = answers(model, config, tokenizer, labels)
        with open(out / f"{name}.json", "w", encoding="ascii", newline="\n") as file:
            file.write("{\n")
            for key, value in head.items():
                file.write(f"{compact(key)}:{compact(value)},\n")
            file.write('"cases":[\n' + ",\n".join(compact(case) for case in cases) + "\n]}\n")
        print(name, len(tensors), "tensors", len(cases), "cases")


if __name__ == "__main__":
    main()
