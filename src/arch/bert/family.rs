//! What the members of BERT's family call their sizes and tensors, and in what few things they
//! differ. Data only; knows no op.

use crate::kernels::ops::Epilogue;

/// One member of the family.
#[derive(Debug)]
pub(super) struct Family {
    /// What tensor names of the body start with where there is a head beside it.
    pub(super) prefix: &'static str,
    /// Keys of `config.json`.
    pub(super) keys: Keys,
    /// Tensors of a layer.
    pub(super) layer: LayerNames,
    /// Tensors of a classifier's head.
    pub(super) head: HeadNames,
    /// The table of positions starts with unused rows: one for the padding token's id, and those
    /// below it.
    pub(super) padded_positions: bool,
    /// There is a table of token types.
    pub(super) types: bool,
    /// A second text gets token type 1.
    pub(super) segments: bool,
}

/// Keys of `config.json`.
#[derive(Debug)]
pub(super) struct Keys {
    pub(super) hidden: &'static str,
    pub(super) layers: &'static str,
    pub(super) heads: &'static str,
    pub(super) ff: &'static str,
    pub(super) activation: &'static str,
}

/// Names of a layer's tensors, after `{layers}.{index}.`.
#[derive(Debug)]
pub(super) struct LayerNames {
    pub(super) layers: &'static str,
    pub(super) qkv: [&'static str; 3],
    pub(super) output: &'static str,
    pub(super) attention_norm: &'static str,
    pub(super) up: &'static str,
    pub(super) down: &'static str,
    pub(super) mlp_norm: &'static str,
}

/// A classifier's two matrices and what stands between them.
#[derive(Debug)]
pub(super) struct HeadNames {
    pub(super) dense: &'static str,
    pub(super) activation: Epilogue,
    pub(super) output: &'static str,
}

const KEYS: Keys = Keys {
    hidden: "hidden_size",
    layers: "num_hidden_layers",
    heads: "num_attention_heads",
    ff: "intermediate_size",
    activation: "hidden_act",
};

const LAYER: LayerNames = LayerNames {
    layers: "encoder.layer",
    qkv: ["attention.self.query", "attention.self.key", "attention.self.value"],
    output: "attention.output.dense",
    attention_norm: "attention.output.LayerNorm",
    up: "intermediate.dense",
    down: "output.dense",
    mlp_norm: "output.LayerNorm",
};

pub(super) static BERT: Family = Family {
    prefix: "bert.",
    keys: KEYS,
    layer: LAYER,
    head: HeadNames {
        dense: "bert.pooler.dense",
        activation: Epilogue::Tanh,
        output: "classifier",
    },
    padded_positions: false,
    types: true,
    segments: true,
};

/// Also XLM-RoBERTa and CamemBERT: the difference is in the tokenizer.
pub(super) static ROBERTA: Family = Family {
    prefix: "roberta.",
    keys: KEYS,
    layer: LAYER,
    head: HeadNames {
        dense: "classifier.dense",
        activation: Epilogue::Tanh,
        output: "classifier.out_proj",
    },
    padded_positions: true,
    types: true,
    segments: false,
};

pub(super) static DISTILBERT: Family = Family {
    prefix: "distilbert.",
    keys: Keys {
        hidden: "dim",
        layers: "n_layers",
        heads: "n_heads",
        ff: "hidden_dim",
        activation: "activation",
    },
    layer: LayerNames {
        layers: "transformer.layer",
        qkv: ["attention.q_lin", "attention.k_lin", "attention.v_lin"],
        output: "attention.out_lin",
        attention_norm: "sa_layer_norm",
        up: "ffn.lin1",
        down: "ffn.lin2",
        mlp_norm: "output_layer_norm",
    },
    head: HeadNames { dense: "pre_classifier", activation: Epilogue::Relu, output: "classifier" },
    padded_positions: false,
    types: false,
    segments: false,
};
