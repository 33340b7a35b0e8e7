//! The bodies of this API. Unknown fields are ignored.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::refusal::Refusal;
use crate::error::Error;
use crate::http::input::Input;
use crate::http::object::Object;
use crate::request::TokenId;
use crate::text::{Cut, Passage, Piece, Side};

/// `/embed`.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(default)]
#[schemars(extend("required" = ["inputs"]))]
pub(super) struct EmbedBody {
    pub(super) model: Option<String>,
    #[schemars(required)]
    pub(super) inputs: Option<Input>,
    #[serde(flatten)]
    pub(super) cut: CutFields,
    pub(super) normalize: Option<bool>,
    #[schemars(range(min = 1))]
    pub(super) dimensions: Option<u64>,
}

/// `/embed_all`.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(default)]
#[schemars(extend("required" = ["inputs"]))]
pub(super) struct EmbedAllBody {
    pub(super) model: Option<String>,
    #[schemars(required)]
    pub(super) inputs: Option<Input>,
    #[serde(flatten)]
    pub(super) cut: CutFields,
}

/// How inputs are prepared.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(default)]
pub(super) struct CutFields {
    truncate: Option<bool>,
    #[schemars(extend("enum" = ["Left", "Right", "left", "right", null]))]
    truncation_direction: Option<String>,
    #[schemars(skip)]
    prompt_name: Option<String>,
}

/// `/similarity`.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(default)]
#[schemars(extend("required" = ["inputs"]))]
pub(super) struct SimilarityBody {
    pub(super) model: Option<String>,
    #[schemars(required)]
    pub(super) inputs: Option<Object<Comparison>>,
    pub(super) parameters: Option<Object<CutFields>>,
}

#[derive(Debug, Deserialize, JsonSchema)]
pub(super) struct Comparison {
    #[schemars(length(min = 1))]
    pub(super) source_sentence: String,
    #[schemars(length(min = 1), inner(length(min = 1)))]
    pub(super) sentences: Vec<String>,
}

/// `/predict`.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(default)]
#[schemars(extend("required" = ["inputs"]))]
pub(super) struct PredictBody {
    pub(super) model: Option<String>,
    #[schemars(required)]
    pub(super) inputs: Option<Predicted>,
    pub(super) raw_scores: Option<bool>,
    #[serde(flatten)]
    pub(super) cut: CutFields,
}

/// One text or pair, or a list of these; a flat list of two texts is a pair.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(untagged)]
pub(super) enum Predicted {
    Text(#[schemars(length(min = 1))] String),
    Pair(#[schemars(length(min = 1, max = 2), inner(length(min = 1)))] Vec<String>),
    Many(#[schemars(length(min = 1))] Vec<Vec<String>>),
}

/// `/tokenize`.
#[derive(Debug, Deserialize, JsonSchema)]
pub(super) struct TokenizeBody {
    #[serde(default)]
    pub(super) model: Option<String>,
    pub(super) inputs: OneOrMany,
    /// Unless it is false.
    #[serde(default)]
    pub(super) add_special_tokens: Option<bool>,
}

#[derive(Debug, Deserialize, JsonSchema)]
#[serde(untagged)]
pub(super) enum OneOrMany {
    One(String),
    Many(#[schemars(length(min = 1))] Vec<String>),
}

/// `/decode`.
#[derive(Debug, Deserialize, JsonSchema)]
pub(super) struct DecodeBody {
    #[serde(default)]
    pub(super) model: Option<String>,
    pub(super) ids: Ids,
    /// Unless it is false.
    #[serde(default)]
    pub(super) skip_special_tokens: Option<bool>,
}

#[derive(Debug, Deserialize, JsonSchema)]
#[serde(untagged)]
pub(super) enum Ids {
    One(#[schemars(length(min = 1))] Vec<TokenId>),
    Many(#[schemars(length(min = 1), inner(length(min = 1)))] Vec<Vec<TokenId>>),
}

#[derive(Serialize, JsonSchema)]
pub(super) struct Prediction<'a> {
    pub(super) score: f32,
    pub(super) label: &'a str,
}

#[derive(Serialize, JsonSchema)]
pub(super) struct Token<'a> {
    pub(super) id: TokenId,
    pub(super) text: &'a str,
    pub(super) special: bool,
    pub(super) start: Option<usize>,
    pub(super) stop: Option<usize>,
}

impl<'a> From<&'a Piece> for Token<'a> {
    fn from(piece: &'a Piece) -> Self {
        Self {
            id: piece.id,
            text: &piece.text,
            special: piece.special,
            start: piece.characters.map(|(start, _)| start),
            stop: piece.characters.map(|(_, end)| end),
        }
    }
}

impl CutFields {
    /// These two.
    pub(super) fn new(truncate: Option<bool>, direction: Option<String>) -> Self {
        Self { truncate, truncation_direction: direction, prompt_name: None }
    }

    /// How inputs are shortened to `length`, if they may be.
    ///
    /// # Errors
    /// `InvalidRequest` for an unknown side, or a prompt: models have none here.
    pub(super) fn read(&self, length: u32) -> Result<Option<Cut>, Error> {
        if let Some(name) = &self.prompt_name {
            let shown: String = name.chars().take(80).collect();
            let message = format!("the model has no prompt named '{shown}'; send it as text");
            return Err(Error::invalid("prompt_name", message));
        }
        let side = match self.truncation_direction.as_deref() {
            None | Some("Right" | "right") => Side::Right,
            Some("Left" | "left") => Side::Left,
            Some(_) => {
                let message = "truncation_direction has to be 'Left' or 'Right'";
                return Err(Error::invalid("truncation_direction", message));
            }
        };
        let cut = Cut { length: length as usize, second: usize::MAX, side };
        Ok(self.truncate.unwrap_or(false).then_some(cut))
    }
}

impl Predicted {
    /// Number of texts and pairs.
    pub(super) fn len(&self) -> usize {
        match self {
            Predicted::Text(_) | Predicted::Pair(_) => 1,
            Predicted::Many(many) => many.len(),
        }
    }

    /// Texts and pairs, and whether they came as a list.
    pub(super) fn passages(self) -> Result<(Vec<Passage>, bool), Refusal> {
        let (rows, many) = match self {
            Predicted::Text(text) => (vec![vec![text]], false),
            Predicted::Pair(pair) => (vec![pair], false),
            Predicted::Many(many) => (many, true),
        };
        if rows.is_empty() || rows.iter().flatten().any(String::is_empty) {
            return Err(Refusal::empty("inputs"));
        }
        let passages = rows.into_iter().map(|row| {
            let count = row.len();
            let mut texts = row.into_iter();
            match (texts.next(), texts.next()) {
                (Some(text), second) if count <= 2 => Ok(Passage { text: text.into(), second }),
                _ => {
                    let message = format!(
                        "an input has {count} texts; 1, or 2 as a pair; lists are [[…], …]"
                    );
                    Err(Error::invalid("inputs", message).into())
                }
            }
        });
        Ok((passages.collect::<Result<_, Refusal>>()?, many))
    }
}

impl OneOrMany {
    pub(super) fn list(self) -> Vec<String> {
        match self {
            OneOrMany::One(text) => vec![text],
            OneOrMany::Many(texts) => texts,
        }
    }
}

impl Ids {
    pub(super) fn list(self) -> Vec<Vec<TokenId>> {
        match self {
            Ids::One(ids) => vec![ids],
            Ids::Many(lists) => lists,
        }
    }
}
