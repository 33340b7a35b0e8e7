//! A model's architecture as its own configuration gives it, and what follows from it without a
//! tensor: parameters, KV cache, workspace. Knows neither devices nor files.

use serde_json::Value as Json;

use crate::arch::Outline;
use crate::kernels::builder::Capacity;
use crate::kernels::ops::KvShape;
use crate::model::ModelTask;
use crate::store::gguf::Header;

/// Hyper-parameters of a decoder or an encoder, checked.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Shape {
    /// Attends to what came before only, and has a KV cache.
    pub(super) decoder: bool,
    pub(super) hidden: u64,
    pub(super) layers: u64,
    pub(super) heads: u64,
    pub(super) kv_heads: u64,
    pub(super) head_dim: u64,
    pub(super) ff: u64,
    pub(super) vocab: u64,
    /// Longest sequence that it was made for.
    pub(super) context: u64,
    /// The head is the embedding table.
    pub(super) tied: bool,
    /// Scores a pair instead of giving a vector.
    pub(super) scores: bool,
    extra: Extra,
}

/// Small parameters that families differ in.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
struct Extra {
    qkv_bias: bool,
    out_bias: bool,
    mlp_bias: bool,
    qk_norm: bool,
    /// Rows of learned positions and of token types.
    positions: u64,
    types: u64,
}

/// Parameters by where a step meets them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Parameters {
    /// Every token goes through these.
    pub(super) layers: u64,
    /// Rows that yield something go through these too.
    pub(super) head: u64,
    /// Looked up or small.
    pub(super) rest: u64,
}

impl Parameters {
    /// All of them. A tied head is counted once.
    pub(super) fn total(&self, tied: bool) -> u64 {
        self.layers + self.rest + if tied { 0 } else { self.head }
    }
}

const DECODERS: [&str; 4] = ["llama", "mistral", "qwen2", "qwen3"];
const ENCODERS: [&str; 3] = ["bert", "roberta", "xlm-roberta"];

impl Shape {
    /// From the keys of a `config.json`.
    ///
    /// # Errors
    /// An architecture that is not known, or a key that is missing or absurd.
    pub(super) fn from_config(config: &Json) -> Result<Self, String> {
        let text = |key: &str| config.get(key).and_then(Json::as_str);
        let family = text("model_type").unwrap_or("(no model_type)");
        let number = |key: &str| match config.get(key) {
            None | Some(Json::Null) => Ok(None),
            Some(value) => sane(key, value.as_u64()).map(Some),
        };
        let needed = |key: &str| number(key)?.ok_or_else(|| format!("'{key}' is missing"));
        let flag = |key: &str| config.get(key).and_then(Json::as_bool);
        let decoder = DECODERS.contains(&family);
        if !decoder && !ENCODERS.contains(&family) {
            return Err(unknown(family));
        }
        let heads = needed("num_attention_heads")?;
        let hidden = needed("hidden_size")?;
        let positions = needed("max_position_embeddings")?;
        // RoBERTa counts positions from the padding token's id plus one.
        let unused = if decoder || family == "bert" { 0 } else { 2 };
        let classes = config.get("architectures").and_then(|list| list.get(0)?.as_str());
        let bias = flag("attention_bias").unwrap_or(false);
        let extra = Extra {
            qkv_bias: !decoder || bias || family == "qwen2",
            out_bias: !decoder || bias,
            mlp_bias: !decoder || flag("mlp_bias").unwrap_or(false),
            qk_norm: family == "qwen3",
            positions: if decoder { 0 } else { positions },
            types: if decoder { 0 } else { number("type_vocab_size")?.unwrap_or(2) },
        };
        Self {
            decoder,
            hidden,
            layers: needed("num_hidden_layers")?,
            heads,
            kv_heads: number("num_key_value_heads")?.unwrap_or(heads),
            head_dim: number("head_dim")?.unwrap_or(hidden / heads),
            ff: needed("intermediate_size")?,
            vocab: needed("vocab_size")?,
            context: positions.saturating_sub(unused),
            tied: !decoder || flag("tie_word_embeddings").unwrap_or(false),
            scores: classes.is_some_and(|class| class.ends_with("ForSequenceClassification")),
            extra,
        }
        .checked()
    }

    /// From a GGUF header.
    ///
    /// # Errors
    /// As [`Shape::from_config`].
    pub(super) fn from_gguf(header: &Header) -> Result<Self, String> {
        let family = header.str("general.architecture").map_err(|error| error.to_string())?;
        let decoder = DECODERS.contains(&family);
        if !decoder && !ENCODERS.contains(&family) {
            return Err(unknown(family));
        }
        let number = |key: &str| -> Result<Option<u64>, String> {
            let key = format!("{family}.{key}");
            if !header.has(&key) {
                return Ok(None);
            }
            sane(&key, header.u64(&key).ok()).map(Some)
        };
        let needed = |key: &str| number(key)?.ok_or_else(|| format!("'{family}.{key}' is missing"));
        let heads = needed("attention.head_count")?;
        let hidden = needed("embedding_length")?;
        let table = header.tensor("token_embd.weight").map_err(|error| error.to_string())?;
        Self {
            decoder,
            hidden,
            layers: needed("block_count")?,
            heads,
            kv_heads: number("attention.head_count_kv")?.unwrap_or(heads),
            head_dim: number("attention.key_length")?.unwrap_or(hidden / heads),
            ff: needed("feed_forward_length")?,
            vocab: table.shape.first().map_or(0, |rows| *rows as u64),
            context: needed("context_length")?,
            tied: !header.tensors.contains_key("output.weight"),
            scores: header.tensors.contains_key("cls.weight"),
            extra: Extra::default(),
        }
        .checked()
    }

    fn checked(self) -> Result<Self, String> {
        if !self.heads.is_multiple_of(self.kv_heads) {
            return Err(format!(
                "{} query heads are no multiple of {} KV heads",
                self.heads, self.kv_heads
            ));
        }
        let most = [
            ("layers", self.layers, 1024),
            ("heads", self.heads, 1024),
            ("values a head", self.head_dim, 1024),
            ("values a token", self.hidden, 1 << 17),
            ("values of an MLP", self.ff, 1 << 20),
        ];
        for (what, value, most) in most {
            if value == 0 || value > most {
                return Err(format!("{value} {what}: from 1 to {most} are known"));
            }
        }
        if self.context == 0 || self.vocab == 0 {
            return Err("no positions or no vocabulary".into());
        }
        Ok(self)
    }

    /// Parameters as the architecture has them.
    pub(super) fn parameters(&self) -> Parameters {
        let Shape { hidden, ff, vocab, .. } = *self;
        let Extra { qkv_bias, out_bias, mlp_bias, qk_norm, positions, types } = self.extra;
        let count = |is: bool, size: u64| if is { size } else { 0 };
        let query = self.heads * self.head_dim;
        let qkv = query + 2 * self.kv_heads * self.head_dim;
        let attention = hidden * qkv
            + query * hidden
            + count(qkv_bias, qkv)
            + count(out_bias, hidden)
            + count(qk_norm, 2 * self.head_dim);
        if self.decoder {
            let mlp = 3 * hidden * ff + count(mlp_bias, 2 * ff + hidden);
            return Parameters {
                layers: self.layers * (attention + mlp + 2 * hidden),
                head: vocab * hidden,
                rest: vocab * hidden + hidden,
            };
        }
        let mlp = 2 * hidden * ff + ff + hidden;
        // A layer normalisation has a weight and a bias. BERT's file holds a pooler; a scoring
        // head is a square matrix and one output, each with its bias.
        let top = count(self.scores || self.pooler(), hidden * hidden + hidden)
            + count(self.scores, hidden + 1);
        Parameters {
            layers: self.layers * (attention + mlp + 4 * hidden),
            head: 0,
            rest: (vocab + positions + types) * hidden + 2 * hidden + top,
        }
    }

    /// Plain BERT carries a pooler that embeddings do not use. RoBERTa's files leave it out when
    /// they score; its embedding models mostly carry it.
    fn pooler(&self) -> bool {
        !self.decoder && !self.scores
    }

    /// The KV cache of a decoder.
    pub(super) fn kv(&self) -> Option<KvShape> {
        let size = |value: u64| value as usize;
        self.decoder.then(|| KvShape {
            layers: size(self.layers),
            heads: size(self.kv_heads),
            head_dim: size(self.head_dim),
        })
    }

    /// What the engine's memory ledger asks of a model.
    pub(super) fn outline(&self) -> Outline {
        Outline {
            task: if self.decoder { ModelTask::Generate } else { ModelTask::Embed },
            context: self.context as usize,
            kv: self.kv(),
            output_width: if self.decoder { self.vocab } else { self.hidden } as usize,
        }
    }

    /// Bytes of workspace, as the builders in `arch` lay it out: activations in f32, the inputs of
    /// quantised matrices in 8 bits with scales. A test compares this with real programs.
    pub(super) fn workspace_bytes(&self, capacity: Capacity, quantised: bool) -> u64 {
        let [rows, yields] = [capacity.rows, capacity.yields].map(|rows| rows as u64);
        let full = |rows: u64, width: u64| (rows * width * 4).next_multiple_of(64);
        let input = |rows: u64, width: u64| match quantised {
            true => {
                let groups = (rows * (width / 32) * 4).next_multiple_of(64);
                (rows * width).next_multiple_of(64) + 2 * groups
            }
            false => full(rows, width),
        };
        let (hidden, query) = (self.hidden, self.heads * self.head_dim);
        let qkv = query + 2 * self.kv_heads * self.head_dim;
        if !self.decoder {
            return full(rows, hidden)
                + full(rows, qkv)
                + full(rows, self.ff)
                + input(rows, query)
                + full(yields, hidden);
        }
        let mut inputs = vec![hidden, query, self.ff];
        inputs.sort_unstable();
        inputs.dedup();
        let inputs: u64 = inputs.into_iter().map(|width| input(rows, width)).sum();
        let head = full(yields, hidden) + input(yields, hidden) + full(yields, self.vocab);
        full(rows, hidden) + full(rows, qkv) + full(rows, 2 * self.ff) + inputs + head
    }
}

fn unknown(family: &str) -> String {
    let known = DECODERS.iter().chain(&ENCODERS).copied().collect::<Vec<_>>().join(", ");
    format!("architecture '{family}' cannot be planned; known are {known}")
}

/// Sizes beyond any known model would overflow what is computed from them.
fn sane(key: &str, value: Option<u64>) -> Result<u64, String> {
    let message = || format!("'{key}' is not a whole number from 1 to {}", 1 << 24);
    value.filter(|value| (1..=1 << 24).contains(value)).ok_or_else(message)
}
