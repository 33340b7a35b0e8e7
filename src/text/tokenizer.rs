//! Building tokenizers from what model files carry, and encoding with them. Knows nothing of
//! templates; limits on the length of a text are the caller's.

use std::fmt;
use std::panic::catch_unwind;
use std::sync::Arc;

use tokenizers::{Encoding, Model as _, ModelWrapper, Token};

use super::bpe::{Alphabet, Bpe};
use super::control::Controls;
use super::decode::TokenBytes;
use super::encode::failed;
use super::huggingface::{Spelling, continuing};
use super::literal::Part;
use super::spm::Spm;
use super::{DecodeStream, TextError, Tokenizer};
use crate::error::{Error, ErrorKind, Result};
use crate::request::TokenId;

/// What encodes plain text.
#[derive(Debug)]
pub(super) enum Model {
    /// A byte-level vocabulary from a GGUF file.
    Bpe(Box<Bpe>),
    /// A SentencePiece vocabulary from a GGUF file.
    Spm(Box<Spm>),
    /// Whatever a `tokenizer.json` describes; wraps by itself.
    Hf(Box<tokenizers::Tokenizer>),
}

impl Tokenizer {
    /// The tokenizer of a `tokenizer.json`. Its own padding and truncation are switched off:
    /// limits are the server's, and must not cut a text in silence. Decoding is exact for
    /// byte-level and
    /// SentencePiece vocabularies; others give their tokens as they are written.
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
        if let Some(id) = wrapping(&hf).map_err(invalid)?.iter().find(|&&id| id as usize >= size) {
            return Err(TextError(format!(
                "tokenizer.json puts token {id} around texts, which is none of its {size}"
            )));
        }
        let spelling = Spelling::of(&hf);
        let alphabet = Alphabet::new();
        let mut texts = vec![""; size];
        for (text, id) in &vocabulary {
            texts[*id as usize] = text;
        }
        let mut bytes = TokenBytes::default();
        for (id, text) in texts.into_iter().enumerate() {
            match (added.get(&(id as TokenId)), spelling) {
                (Some(added), _) if added.special => bytes.push(&[]),
                (None, Spelling::ByteLevel) => bytes.push(&alphabet.bytes(text)),
                (None, Spelling::Sentence { bytes: single, .. }) => {
                    bytes.push(&Spelling::sentence_bytes(text, single));
                }
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
        Ok(Self {
            continued: continuing(&hf),
            model: Model::Hf(Box::new(hf)),
            bytes,
            controls,
            begin: None,
            end: None,
            space_before: matches!(spelling, Spelling::Sentence { space_before: true, .. }),
        })
    }

    /// Token ids of `text`, control-token look-alikes as plain text; with the model's own
    /// prefix and suffix tokens (BERT's `[CLS]`, `[SEP]`; a BOS where the model wants one) if
    /// `wrap`. Takes time in proportion to the text's length, for one long word too.
    ///
    /// # Errors
    /// The text holds a control token that this vocabulary cannot write in any other way.
    pub fn encode(&self, text: &str, wrap: bool) -> Result<Vec<TokenId>> {
        let mut ids = Vec::with_capacity(text.len() / 3 + 2);
        ids.extend(self.begin.filter(|_| wrap));
        match &self.model {
            Model::Bpe(bpe) => bpe.encode(text, &mut ids)?,
            Model::Spm(spm) => spm.encode(text, &mut ids)?,
            Model::Hf(hf) => return self.encode_hf(hf, text, wrap),
        }
        ids.extend(self.end.filter(|_| wrap));
        Ok(ids)
    }

    /// Token ids of a prompt that its caller has put together: wrapped, and what is written like a
    /// control token is one. A beginning that is written out does not get a second one.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_prompt(&self, text: &str) -> Result<Vec<TokenId>> {
        let controls = self.controls.literals();
        if controls.find(text, 0).is_none() {
            return self.encode(text, true);
        }
        let mut ids = Vec::with_capacity(text.len() / 3 + 2);
        for part in controls.parts(text) {
            match part {
                Part::Token(id) => ids.push(id),
                Part::Text(text) if ids.is_empty() => ids.extend(self.encode(text, false)?),
                Part::Text(text) => ids.extend(self.encode_continued(text)?),
            }
        }
        let (first, length) = (ids[0], ids.len());
        let mut ids = self.wrap(ids)?;
        if self.controls.contains(first) && ids.len() > length && ids[..2] == [first; 2] {
            ids.remove(0);
        }
        Ok(ids)
    }

    /// `ids` with the model's own prefix and suffix tokens.
    fn wrap(&self, ids: Vec<TokenId>) -> Result<Vec<TokenId>> {
        let Model::Hf(hf) = &self.model else {
            return Ok(self.begin.into_iter().chain(ids).chain(self.end).collect());
        };
        let token = |id| Token::new(id, String::new(), (0, 0));
        let encoding = Encoding::from_tokens(ids.into_iter().map(token).collect(), 0);
        Ok(hf.post_process(encoding, None, true).map_err(failed)?.get_ids().to_vec())
    }

    /// Token ids of `text` that goes on after a control token, as [`Tokenizer::encode`] without
    /// wrapping.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub(super) fn encode_continued(&self, text: &str) -> Result<Vec<TokenId>> {
        match &self.continued {
            Some(hf) => self.encode_hf(hf, text, false),
            None => self.encode(text, false),
        }
    }

    fn encode_hf(
        &self,
        hf: &tokenizers::Tokenizer,
        text: &str,
        wrap: bool,
    ) -> Result<Vec<TokenId>> {
        let encoding = hf.encode_fast(text, wrap).map_err(failed)?;
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

    /// The text of `ids`; control tokens add nothing, nor does the space that goes before texts.
    pub fn decode(&self, ids: &[TokenId]) -> String {
        let bytes: Vec<u8> = ids.iter().flat_map(|id| self.bytes.get(*id)).copied().collect();
        let bytes = match bytes.strip_prefix(b" ") {
            Some(rest) if self.space_before => rest,
            _ => &bytes,
        };
        String::from_utf8_lossy(bytes).into_owned()
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

/// The ids that `hf` puts around one text and around two, which it does not look up.
fn wrapping(hf: &tokenizers::Tokenizer) -> tokenizers::Result<Vec<TokenId>> {
    let wrap = |second| hf.post_process(Encoding::default(), second, true);
    let (one, two) = (wrap(None)?, wrap(Some(Encoding::default()))?);
    Ok([one.get_ids(), two.get_ids()].concat())
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
