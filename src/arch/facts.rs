//! What a decoder's file says about its sizes, whatever kind of file it is: GGUF metadata under the
//! architecture's name, or `config.json`. Knows keys, not what is built from them.

use serde_json::Value as Json;

use crate::arch::rope::Rope;
use crate::arch::{Description, shape};
use crate::store::gguf::Header;
use crate::weights::LoadError;

/// A description that can be asked.
pub(super) enum Facts<'a> {
    Gguf {
        header: &'a Header,
        /// `general.architecture`, with which all keys begin.
        prefix: &'a str,
    },
    Json(&'a Json),
}

impl<'a> Facts<'a> {
    pub(super) fn new(description: &Description<'a>) -> Result<Self, LoadError> {
        Ok(match description {
            Description::Gguf(header) => {
                Self::Gguf { header, prefix: header.str("general.architecture").map_err(shape)? }
            }
            Description::Json { config, .. } => Self::Json(config),
        })
    }

    pub(super) fn is_gguf(&self) -> bool {
        matches!(self, Self::Gguf { .. })
    }

    /// Fails on what would change the result and is not computed here.
    pub(super) fn refuse_unknown(&self) -> Result<(), LoadError> {
        let refuse = |what: &str| Err(LoadError::Shape(what.to_owned()));
        if self.optional("expert_count", "num_local_experts")?.is_some_and(|count| count > 0) {
            return refuse("mixtures of experts are not known yet");
        }
        let Self::Json(config) = self else { return Ok(()) };
        let activation = config.get("hidden_act").and_then(Json::as_str).unwrap_or("silu");
        if !matches!(activation, "silu" | "swish") {
            return refuse(&format!("config.json: hidden_act '{activation}' is not known"));
        }
        if config.get("quantization_config").is_some_and(|value| !value.is_null()) {
            return refuse(
                "config.json: 'quantization_config' is not known; quantised models are read from \
                 GGUF files",
            );
        }
        Ok(())
    }

    pub(super) fn hidden(&self) -> Result<usize, LoadError> {
        self.size("embedding_length", "hidden_size")
    }

    pub(super) fn layers(&self) -> Result<usize, LoadError> {
        self.size("block_count", "num_hidden_layers")
    }

    pub(super) fn heads(&self) -> Result<usize, LoadError> {
        self.size("attention.head_count", "num_attention_heads")
    }

    pub(super) fn kv_heads(&self, heads: usize) -> Result<usize, LoadError> {
        let given = self.optional("attention.head_count_kv", "num_key_value_heads")?;
        Ok(given.unwrap_or(heads))
    }

    pub(super) fn head_dim(&self, hidden: usize, heads: usize) -> Result<usize, LoadError> {
        let given = self.optional("attention.key_length", "head_dim")?;
        let value_length = self.optional("attention.value_length", "v_head_dim")?;
        if value_length.is_some() && value_length != given {
            return Err(LoadError::Shape("keys and values of different sizes".into()));
        }
        Ok(given.unwrap_or(hidden.checked_div(heads).unwrap_or(0)))
    }

    pub(super) fn ff(&self) -> Result<usize, LoadError> {
        self.size("feed_forward_length", "intermediate_size")
    }

    pub(super) fn context(&self) -> Result<usize, LoadError> {
        self.size("context_length", "max_position_embeddings")
    }

    /// The sliding window of attention, if there is one.
    pub(super) fn window(&self) -> Result<Option<usize>, LoadError> {
        self.optional("attention.sliding_window", "sliding_window")
    }

    /// GGUF's embedding table says how large the vocabulary is; its metadata key is optional.
    pub(super) fn vocab(&self) -> Result<usize, LoadError> {
        let Self::Gguf { header, .. } = self else { return self.size("", "vocab_size") };
        let table = header.tensors.get("token_embd.weight");
        let rows = table.and_then(|tensor| tensor.shape.first()).copied();
        rows.ok_or_else(|| LoadError::Shape("tensor 'token_embd.weight' is missing".into()))
    }

    pub(super) fn eps(&self) -> Result<f32, LoadError> {
        match self {
            Self::Gguf { header, prefix } => {
                let key = format!("{prefix}.attention.layer_norm_rms_epsilon");
                header.f32(&key).map_err(shape)
            }
            Self::Json(config) => {
                let eps = config.get("rms_norm_eps").and_then(Json::as_f64);
                eps.map(|eps| eps as f32).ok_or_else(|| missing("rms_norm_eps"))
            }
        }
    }

    /// Of a model that is described with `context` positions.
    pub(super) fn rope(&self, context: usize) -> Result<Rope, LoadError> {
        match self {
            Self::Gguf { header, prefix } => Rope::from_gguf(header, prefix, context),
            Self::Json(config) => Rope::from_json(config, context),
        }
    }

    /// Dimensions of a head that are turned.
    pub(super) fn rope_dims(&self, head_dim: usize) -> Result<usize, LoadError> {
        let given = match self {
            Self::Gguf { .. } => self.optional("rope.dimension_count", "")?,
            Self::Json(_) => None,
        };
        Ok(given.unwrap_or(head_dim))
    }

    /// Whether the head must be the embedding table. A GGUF file says so by having no head.
    pub(super) fn tied(&self) -> bool {
        let Self::Json(config) = self else { return false };
        config.get("tie_word_embeddings").and_then(Json::as_bool).unwrap_or(false)
    }

    /// Whether `config.json` has this key; true for other files.
    pub(super) fn says(&self, key: &str) -> bool {
        let Self::Json(config) = self else { return true };
        config.get(key).is_some()
    }

    /// A truth value that only `config.json` has.
    pub(super) fn flag(&self, key: &str) -> Option<bool> {
        let Self::Json(config) = self else { return None };
        config.get(key).and_then(Json::as_bool)
    }

    /// A list that only `config.json` has.
    pub(super) fn list(&self, key: &str) -> Option<&[Json]> {
        let Self::Json(config) = self else { return None };
        config.get(key).and_then(Json::as_array).map(Vec::as_slice)
    }

    fn size(&self, gguf: &str, json: &str) -> Result<usize, LoadError> {
        let name = match self {
            Self::Gguf { prefix, .. } => format!("{prefix}.{gguf}"),
            Self::Json(_) => json.to_owned(),
        };
        self.optional(gguf, json)?.ok_or_else(|| missing(&name))
    }

    fn optional(&self, gguf: &str, json: &str) -> Result<Option<usize>, LoadError> {
        match self {
            Self::Gguf { header, prefix } => {
                let key = format!("{prefix}.{gguf}");
                let value = header.has(&key).then(|| header.u32(&key)).transpose();
                value.map(|value| value.map(|value| value as usize)).map_err(shape)
            }
            Self::Json(config) => match config.get(json) {
                None | Some(Json::Null) => Ok(None),
                Some(value) => {
                    let size = value.as_u64().filter(|&size| size < 1 << 32);
                    let absurd = || LoadError::Shape(format!("config.json: '{json}' is {value}"));
                    size.map(|size| Some(size as usize)).ok_or_else(absurd)
                }
            },
        }
    }
}

fn missing(key: &str) -> LoadError {
    LoadError::Shape(format!("the model's description lacks '{key}'"))
}
