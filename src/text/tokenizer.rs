//! Building tokenizers from what model files carry, and encoding with them. Knows nothing of
//! templates; limits on the length of a text are the caller's.

use std::collections::HashMap;
use std::fmt;
use std::panic::catch_unwind;
use std::sync::Arc;

use tokenizers::{DecoderWrapper, Model as _, ModelWrapper};

use super::bpe::{Alphabet, Bpe, scheme};
use super::control::Controls;
use super::decode::TokenBytes;
use super::literal::Literals;
use super::{DecodeStream, TextError, Tokenizer};
use crate::error::{Error, ErrorKind, Result};
use crate::request::TokenId;
use crate::store::gguf::Header;

/// What encodes plain text.
#[derive(Debug)]
pub(super) enum Model {
    /// A byte-level vocabulary from a GGUF file.
    Bpe(Box<Bpe>),
    /// Whatever a `tokenizer.json` describes; wraps by itself.
    Hf(Box<tokenizers::Tokenizer>),
}

const TOKENS: &str = "tokenizer.ggml.tokens";
const MERGES: &str = "tokenizer.ggml.merges";
const TYPES: &str = "tokenizer.ggml.token_type";

/// Values of `tokenizer.ggml.token_type`.
const NORMAL: i64 = 1;
const UNKNOWN: i64 = 2;
const CONTROL: i64 = 3;
const USER_DEFINED: i64 = 4;

impl Tokenizer {
    /// The tokenizer of a `tokenizer.json`. Its own padding and truncation are switched off:
    /// limits are the server's, and must not cut a text in silence. Decoding is exact for
    /// byte-level vocabularies; others give their tokens as they are written.
    ///
    /// # Errors
    /// The file is not one.
    pub fn from_hf_json(json: &[u8]) -> std::result::Result<Self, TextError> {
        let invalid = |error| TextError(format!("tokenizer.json cannot be read: {error}"));
        // The library indexes tables that the file describes.
        let parsed = catch_unwind(|| tokenizers::Tokenizer::from_bytes(json))
            .map_err(|_| TextError("tokenizer.json contradicts itself".to_owned()))?;
        let mut hf = parsed.map_err(invalid)?;
        hf.with_padding(None);
        hf.with_truncation(None).map_err(invalid)?;
        hf.set_encode_special_tokens(true);

        let added = hf.get_added_tokens_decoder();
        let vocabulary = hf.get_vocab(true);
        let size = vocabulary.values().max().map_or(0, |id| *id as usize + 1);
        if size > vocabulary.len().saturating_mul(4).max(1 << 16) {
            return Err(TextError(format!(
                "tokenizer.json has {} tokens, with ids up to {}",
                vocabulary.len(),
                size - 1
            )));
        }
        let alphabet =
            matches!(hf.get_decoder(), Some(DecoderWrapper::ByteLevel(_))).then(Alphabet::new);
        let mut texts = vec![""; size];
        for (text, id) in &vocabulary {
            texts[*id as usize] = text;
        }
        let mut bytes = TokenBytes::default();
        for (id, text) in texts.into_iter().enumerate() {
            match (added.get(&(id as TokenId)), &alphabet) {
                (Some(added), _) if added.special => bytes.push(&[]),
                (None, Some(alphabet)) => bytes.push(&alphabet.bytes(text)),
                _ => bytes.push(text.as_bytes()),
            }
        }
        let unknown = unknown_token(hf.get_model(), json);
        let controls = added
            .iter()
            .filter(|(id, token)| token.special && Some(**id) != unknown)
            .map(|(id, token)| (token.content.clone(), *id))
            .collect();
        let controls = Controls::new(controls)?;
        Ok(Self { model: Model::Hf(Box::new(hf)), bytes, controls, begin: None, end: None })
    }

    /// The tokenizer of a GGUF file: byte-level BPE whose split is one of the known ones.
    ///
    /// # Errors
    /// The vocabulary is of another kind, which is named, or contradicts itself.
    pub fn from_gguf(header: &Header) -> std::result::Result<Self, TextError> {
        let model = header.str("tokenizer.ggml.model")?;
        if model != "gpt2" {
            return Err(TextError(format!("tokenizer model {model:?}: only \"gpt2\" is served")));
        }
        let pre = header.str("tokenizer.ggml.pre")?;
        let scheme = scheme(pre)
            .ok_or_else(|| TextError(format!("pre-tokenizer {pre:?} (tokenizer.ggml.pre)")))?;
        let tokens = header.strings(TOKENS)?;
        let types =
            if header.has(TYPES) { header.integers(TYPES)? } else { vec![NORMAL; tokens.len()] };
        if types.len() != tokens.len() {
            return Err(TextError(format!("{} {TOKENS}, {} {TYPES}", tokens.len(), types.len())));
        }

        let alphabet = Alphabet::new();
        let (mut literals, mut controls) = (Vec::new(), Vec::new());
        let mut plain = HashMap::with_capacity(tokens.len());
        let mut bytes = TokenBytes::default();
        for (id, (text, kind)) in (0..).zip(tokens.iter().zip(types)) {
            match kind {
                CONTROL | UNKNOWN => {
                    controls.push(((*text).to_owned(), id));
                    bytes.push(&[]);
                }
                USER_DEFINED => {
                    literals.push(((*text).to_owned(), id));
                    bytes.push(text.as_bytes());
                }
                _ => bytes.push(&alphabet.bytes(text)),
            }
            // Control tokens are no part of what merging can reach.
            if !matches!(kind, CONTROL | UNKNOWN) && plain.insert(*text, id).is_some() {
                return Err(TextError(format!("token {text:?} appears twice, again as {id}")));
            }
        }
        let bpe = Bpe::new(scheme, &plain, Literals::new(literals)?, &header.strings(MERGES)?)?;
        let wrapping = |flag: &str, id: &str, default: bool| {
            let wanted = if header.has(flag) { header.bool(flag)? } else { default };
            match wanted.then(|| header.u32(id)).transpose()? {
                Some(id) if id as usize >= tokens.len() => {
                    Err(TextError(format!("{flag} needs token {id} of {}", tokens.len())))
                }
                id => Ok(id),
            }
        };
        Ok(Self {
            model: Model::Bpe(Box::new(bpe)),
            bytes,
            controls: Controls::new(controls)?,
            begin: wrapping(
                "tokenizer.ggml.add_bos_token",
                "tokenizer.ggml.bos_token_id",
                scheme.begins,
            )?,
            end: wrapping("tokenizer.ggml.add_eos_token", "tokenizer.ggml.eos_token_id", false)?,
        })
    }

    /// Token ids of `text`, control-token look-alikes as plain text; with the model's own
    /// prefix and suffix tokens (BERT's `[CLS]`, `[SEP]`; a BOS where the model wants one) if
    /// `wrap`. Takes time in proportion to the text's length, for one long word too.
    ///
    /// # Errors
    /// The text holds a control token that this vocabulary cannot write in any other way.
    pub fn encode(&self, text: &str, wrap: bool) -> Result<Vec<TokenId>> {
        let hf = match &self.model {
            Model::Hf(hf) => hf,
            Model::Bpe(bpe) => {
                let mut ids = Vec::with_capacity(text.len() / 3 + 2);
                ids.extend(self.begin.filter(|_| wrap));
                bpe.encode(text, &mut ids)?;
                ids.extend(self.end.filter(|_| wrap));
                return Ok(ids);
            }
        };
        let encoding = hf.encode_fast(text, wrap).map_err(|error| {
            Error::new(ErrorKind::Internal, format!("the text cannot be tokenised: {error}"))
        })?;
        let ids = encoding.get_ids();
        let wrapping = encoding.get_special_tokens_mask();
        for (id, wrapping) in ids.iter().zip(wrapping) {
            if *wrapping == 0 && self.controls.contains(*id) {
                return Err(Error::new(
                    ErrorKind::InvalidRequest,
                    format!("the text holds control token {id}, which only the server may use"),
                ));
            }
        }
        Ok(ids.to_vec())
    }

    /// The text of `ids`; control tokens add nothing.
    pub fn decode(&self, ids: &[TokenId]) -> String {
        let bytes: Vec<u8> = ids.iter().flat_map(|id| self.bytes.get(*id)).copied().collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Number of token ids.
    pub fn vocab_size(&self) -> usize {
        self.bytes.len()
    }

    /// The bytes that a token adds to a text: none for control tokens and unknown ids. They need
    /// not be whole characters.
    pub fn token_bytes(&self, id: TokenId) -> &[u8] {
        self.bytes.get(id)
    }

    /// The control token that is written `text`.
    pub fn control(&self, text: &str) -> Option<TokenId> {
        self.controls.literals().id(text)
    }

    /// How control token `id` is written.
    pub fn control_name(&self, id: TokenId) -> Option<&str> {
        self.controls.literals().text(id)
    }

    /// A decoder for one answer.
    pub fn stream(self: &Arc<Self>) -> DecodeStream {
        DecodeStream::new(Arc::clone(self))
    }
}

/// Not the vocabulary: it is long.
impl fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tokenizer").field("tokens", &self.vocab_size()).finish_non_exhaustive()
    }
}

/// What the model says for text that it has no token for: not a control token.
fn unknown_token(model: &ModelWrapper, json: &[u8]) -> Option<TokenId> {
    #[derive(serde::Deserialize)]
    struct File {
        model: Unigram,
    }
    #[derive(serde::Deserialize)]
    struct Unigram {
        unk_id: Option<TokenId>,
    }
    match model {
        ModelWrapper::BPE(model) => model.token_to_id(model.unk_token.as_deref()?),
        ModelWrapper::WordPiece(model) => model.token_to_id(&model.unk_token),
        ModelWrapper::WordLevel(model) => model.token_to_id(&model.unk_token),
        // The library keeps the number to itself.
        ModelWrapper::Unigram(_) => serde_json::from_slice::<File>(json).ok()?.model.unk_id,
    }
}
