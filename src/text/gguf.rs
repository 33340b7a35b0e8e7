//! Tokenizers from the metadata of GGUF files: which kind of vocabulary it is, what each token is
//! for, and how texts are wrapped. Knows keys, not how text is cut.

use std::collections::HashMap;

use super::bpe::{Alphabet, Bpe};
use super::control::Controls;
use super::decode::TokenBytes;
use super::huggingface::Spelling;
use super::literal::Literals;
use super::split::scheme;
use super::spm::{Piece, Spm};
use super::tokenizer::Model;
use super::{TextError, Tokenizer};
use crate::request::TokenId;
use crate::store::gguf::Header;

const TOKENS: &str = "tokenizer.ggml.tokens";
const MERGES: &str = "tokenizer.ggml.merges";
const SCORES: &str = "tokenizer.ggml.scores";
const TYPES: &str = "tokenizer.ggml.token_type";

/// Values of `tokenizer.ggml.token_type`.
const NORMAL: i64 = 1;
const UNKNOWN: i64 = 2;
const CONTROL: i64 = 3;
const USER_DEFINED: i64 = 4;
const BYTE: i64 = 6;

/// What every kind of vocabulary has.
#[derive(Default)]
struct Sorted {
    /// Found in texts as they are written.
    literals: Vec<(String, TokenId)>,
    controls: Vec<(String, TokenId)>,
    bytes: TokenBytes,
}

impl Tokenizer {
    /// The tokenizer of a GGUF file: byte-level BPE whose split is one of the known ones, or
    /// SentencePiece.
    ///
    /// # Errors
    /// The vocabulary is of another kind, which is named, or contradicts itself.
    pub fn from_gguf(header: &Header) -> Result<Self, TextError> {
        match header.str("tokenizer.ggml.model")? {
            "gpt2" => byte_level(header),
            "llama" => sentence_piece(header),
            other => Err(TextError(format!(
                "tokenizer model {other:?}: only \"gpt2\" and \"llama\" are served"
            ))),
        }
    }
}

fn byte_level(header: &Header) -> Result<Tokenizer, TextError> {
    let pre = header.str("tokenizer.ggml.pre")?;
    let scheme = scheme(pre)
        .ok_or_else(|| TextError(format!("pre-tokenizer {pre:?} (tokenizer.ggml.pre)")))?;
    let (tokens, types) = tokens(header)?;
    let alphabet = Alphabet::new();
    let mut sorted = Sorted::default();
    let mut plain = HashMap::with_capacity(tokens.len());
    for (id, (text, kind)) in (0..).zip(tokens.iter().zip(types)) {
        sorted.add(id, text, kind, || alphabet.bytes(text));
        // Control tokens are no part of what merging can reach.
        if !matches!(kind, CONTROL | UNKNOWN) && plain.insert(*text, id).is_some() {
            return Err(TextError(format!("token {text:?} appears twice, again as {id}")));
        }
    }
    let literals = Literals::new(std::mem::take(&mut sorted.literals))?;
    let bpe = Bpe::new(scheme, &plain, literals, &header.strings(MERGES)?)?;
    sorted.tokenizer(header, Model::Bpe(Box::new(bpe)), scheme.begins)
}

fn sentence_piece(header: &Header) -> Result<Tokenizer, TextError> {
    let (tokens, types) = tokens(header)?;
    let scores = header.floats(SCORES)?;
    if scores.len() != tokens.len() {
        return Err(TextError(format!("{} {TOKENS}, {} {SCORES}", tokens.len(), scores.len())));
    }
    let mut sorted = Sorted::default();
    let mut pieces = Vec::with_capacity(tokens.len());
    let mut unknown = None;
    for (id, ((&text, kind), score)) in (0..).zip(tokens.iter().zip(types).zip(scores)) {
        let byte = kind == BYTE;
        sorted.add(id, text, kind, || Spelling::sentence_bytes(text, byte));
        match kind {
            UNKNOWN => unknown = unknown.or(Some(id)),
            CONTROL => {}
            _ => pieces.push(Piece { text, id, score, byte }),
        }
    }
    let key = "tokenizer.ggml.add_space_prefix";
    let space_before = if header.has(key) { header.bool(key)? } else { true };
    let literals = Literals::new(std::mem::take(&mut sorted.literals))?;
    let spm = Spm::new(&pieces, literals, unknown, space_before)?;
    sorted.tokenizer(header, Model::Spm(Box::new(spm)), true)
}

/// Every token's text and type.
fn tokens(header: &Header) -> Result<(Vec<&str>, Vec<i64>), TextError> {
    let tokens = header.strings(TOKENS)?;
    let types =
        if header.has(TYPES) { header.integers(TYPES)? } else { vec![NORMAL; tokens.len()] };
    if types.len() != tokens.len() {
        return Err(TextError(format!("{} {TOKENS}, {} {TYPES}", tokens.len(), types.len())));
    }
    Ok((tokens, types))
}

impl Sorted {
    /// Puts the token with the next id where it belongs.
    fn add(&mut self, id: TokenId, text: &str, kind: i64, bytes: impl Fn() -> Vec<u8>) {
        match kind {
            CONTROL | UNKNOWN => {
                self.controls.push((text.to_owned(), id));
                self.bytes.push(&[]);
            }
            USER_DEFINED => {
                self.literals.push((text.to_owned(), id));
                self.bytes.push(text.as_bytes());
            }
            _ => self.bytes.push(&bytes()),
        }
    }

    fn tokenizer(
        self,
        header: &Header,
        model: Model,
        begins: bool,
    ) -> Result<Tokenizer, TextError> {
        let count = self.bytes.len();
        let wrapping = |flag: &str, id: &str, default: bool| {
            let wanted = if header.has(flag) { header.bool(flag)? } else { default };
            match wanted.then(|| header.u32(id)).transpose()? {
                Some(id) if id as usize >= count => {
                    Err(TextError(format!("{flag} needs token {id} of {count}")))
                }
                id => Ok(id),
            }
        };
        let begin =
            wrapping("tokenizer.ggml.add_bos_token", "tokenizer.ggml.bos_token_id", begins)?;
        let end = wrapping("tokenizer.ggml.add_eos_token", "tokenizer.ggml.eos_token_id", false)?;
        let space_before = matches!(&model, Model::Spm(spm) if spm.space_before());
        Ok(Tokenizer {
            model,
            continued: None,
            bytes: self.bytes,
            controls: Controls::new(self.controls)?,
            begin,
            end,
            space_before,
        })
    }
}
