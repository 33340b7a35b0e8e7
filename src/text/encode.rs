//! Encoding for encoders: pairs of texts, texts that are cut to a length, and tokens with their
//! places in the text. Knows no model's limits.

use std::sync::Arc;

use tokenizers::utils::truncation::{TruncationDirection, TruncationStrategy};
use tokenizers::{Encoding, TruncationParams, truncate_encodings};

use super::tokenizer::Model;
use super::{Cut, Passage, Piece, Side, Tokenizer};
use crate::error::{Error, ErrorKind, Result};
use crate::request::{Text, TokenId};

impl Passage {
    /// One text.
    pub fn single(text: impl Into<Arc<str>>) -> Self {
        Self { text: text.into(), second: None }
    }

    /// Its texts.
    pub fn texts(&self) -> impl Iterator<Item = &str> {
        std::iter::once(&*self.text).chain(self.second.as_deref())
    }

    /// Bytes of its texts.
    pub fn bytes(&self) -> usize {
        self.texts().map(str::len).sum()
    }
}

impl Tokenizer {
    /// Token ids of each passage, wrapped as the model wants it, and where the second text starts
    /// if its tokens have a type of their own. Control-token look-alikes are plain text. What
    /// passages share as their first text (the query of a ranking) is tokenised once.
    ///
    /// # Errors
    /// `ContextLengthExceeded` for a passage of more than `limit` tokens, naming its index;
    /// `InvalidRequest` for a control token that cannot be written otherwise, or a `cut` that
    /// leaves no room for the wrapping; `Unsupported` for two texts where the vocabulary joins
    /// none.
    pub fn encode_passages(
        &self,
        passages: &[Passage],
        cut: Option<Cut>,
        limit: usize,
    ) -> Result<Vec<Text>> {
        let mut texts = Vec::with_capacity(passages.len());
        let mut first: Option<(&Arc<str>, Encoding)> = None;
        for (index, passage) in passages.iter().enumerate() {
            let fits = |length: usize| {
                if length <= limit { Ok(()) } else { Err(too_long(index, length, limit)) }
            };
            let text = match &self.model {
                Model::Bpe(_) | Model::Spm(_) => self.encode_plain(passage, cut)?,
                Model::Hf(hf) => {
                    let known = first.take().filter(|(text, _)| Arc::ptr_eq(text, &passage.text));
                    let encoding = match known {
                        Some((_, encoding)) => encoding,
                        None => self.unwrapped(hf, &passage.text, cut)?,
                    };
                    if cut.is_none() {
                        fits(encoding.len())?;
                    }
                    let text = self.join(hf, encoding.clone(), passage.second.as_deref(), cut)?;
                    first = Some((&passage.text, encoding));
                    text
                }
            };
            fits(text.tokens.len())?;
            texts.push(text);
        }
        Ok(texts)
    }

    /// One text or two, cut and wrapped.
    fn join(
        &self,
        hf: &tokenizers::Tokenizer,
        mut first: Encoding,
        second: Option<&str>,
        cut: Option<Cut>,
    ) -> Result<Text> {
        let mut second = second.map(|text| self.unwrapped(hf, text, None)).transpose()?;
        let pair = second.is_some();
        if let Some(cut) = cut {
            let wrapping = hf.get_post_processor().map_or(0, |wrap| added(wrap, pair));
            let (room, direction) = (room(cut, wrapping)?, direction(cut.side));
            if let Some(second) = &mut second {
                second.truncate(cut.second, 0, direction);
            }
            let strategy = TruncationStrategy::LongestFirst;
            let params =
                TruncationParams { direction, max_length: room, strategy, ..Default::default() };
            (first, second) = truncate_encodings(first, second, &params).map_err(failed)?;
        }
        let wrapped = hf.post_process(first, second, true).map_err(failed)?;
        let types = wrapped.get_type_ids();
        let second = types.iter().position(|&kind| kind == 1).filter(|_| pair);
        Ok(Text { tokens: wrapped.get_ids().into(), second: second.map(|at| at as u32) })
    }

    /// The tokens of `text`, with the characters that each stands for; wrapped if `wrap`.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn pieces(&self, text: &str, wrap: bool) -> Result<Vec<Piece>> {
        let Model::Hf(hf) = &self.model else {
            return self.plain_pieces(text, wrap);
        };
        // Refuses what may not be said.
        self.encode(text, wrap)?;
        let encoding = hf.encode_char_offsets(text, wrap).map_err(failed)?;
        let characters: Vec<char> = text.chars().collect();
        let tokens = encoding.get_ids().iter().zip(encoding.get_tokens());
        let places = encoding.get_special_tokens_mask().iter().zip(encoding.get_offsets());
        let piece =
            |((&id, token), (&special, &(start, end))): ((_, &String), (_, &(usize, _)))| {
                let special = special == 1;
                let own = characters.get(start..end).filter(|_| !special);
                Piece {
                    id,
                    text: own.map_or_else(|| token.clone(), |own| own.iter().collect()),
                    special,
                    characters: own.map(|_| (start, end)),
                }
            };
        Ok(tokens.zip(places).map(piece).collect())
    }

    /// The text of `ids` as a reader would write it, control tokens left out or shown.
    ///
    /// # Errors
    /// An id that the vocabulary does not have.
    pub fn decode_for_people(&self, ids: &[TokenId], skip_controls: bool) -> Result<String> {
        if let Some(id) = ids.iter().find(|&&id| id as usize >= self.vocab_size()) {
            let message = format!("token id {id} is not one of this model's {}", self.vocab_size());
            return Err(Error::new(ErrorKind::InvalidRequest, message));
        }
        match &self.model {
            Model::Hf(hf) => hf.decode(ids, skip_controls).map_err(failed),
            Model::Bpe(_) | Model::Spm(_) => Ok(self.decode(ids)),
        }
    }

    /// A text without its wrapping; no more of it than `cut` can leave.
    fn unwrapped(
        &self,
        hf: &tokenizers::Tokenizer,
        text: &str,
        cut: Option<Cut>,
    ) -> Result<Encoding> {
        let mut encoding = hf.encode_fast(text, false).map_err(failed)?;
        match encoding.get_ids().iter().find(|id| self.controls.contains(**id)) {
            None => {
                if let Some(cut) = cut {
                    encoding.truncate(cut.length, 0, direction(cut.side));
                }
                Ok(encoding)
            }
            Some(id) => Err(Error::new(
                ErrorKind::InvalidRequest,
                format!("the text holds control token {id}, which only the server may use"),
            )),
        }
    }

    fn encode_plain(&self, passage: &Passage, cut: Option<Cut>) -> Result<Text> {
        if passage.second.is_some() {
            let message = "this model's tokenizer does not join two texts";
            return Err(Error::new(ErrorKind::Unsupported, message));
        }
        let mut tokens = self.encode(&passage.text, true)?;
        if let Some(cut) = cut {
            let ends = (usize::from(self.begin.is_some()), usize::from(self.end.is_some()));
            let room = room(cut, ends.0 + ends.1)?;
            let over = (tokens.len() - ends.0 - ends.1).saturating_sub(room);
            let from = match cut.side {
                Side::Left => ends.0,
                Side::Right => tokens.len() - ends.1 - over,
            };
            tokens.drain(from..from + over);
        }
        Ok(Text::single(tokens))
    }

    /// Tokens of a byte-level vocabulary spell the text byte by byte.
    fn plain_pieces(&self, text: &str, wrap: bool) -> Result<Vec<Piece>> {
        let ids = self.encode(text, wrap)?;
        // Characters are counted as the tokens go on: from the start each time would take hours
        // for one long text.
        let mut ends = text.char_indices().map(|(at, char)| at + char.len_utf8()).peekable();
        let mut counted = 0;
        let mut characters = |byte: usize| {
            while ends.next_if(|end| *end <= byte).is_some() {
                counted += 1;
            }
            counted
        };
        let mut done = 0;
        let piece = |&id: &TokenId| {
            let bytes = self.token_bytes(id);
            let special = bytes.is_empty();
            let place = (characters(done), characters(done + bytes.len()));
            done += bytes.len();
            Piece {
                id,
                text: String::from_utf8_lossy(bytes).into_owned(),
                special,
                characters: (!special).then_some(place),
            }
        };
        Ok(ids.iter().map(piece).collect())
    }
}

fn added(wrap: &impl tokenizers::PostProcessor, pair: bool) -> usize {
    wrap.added_tokens(pair)
}

/// The error for an input above the model's limit.
pub fn too_long(index: usize, length: usize, limit: usize) -> Error {
    let message =
        format!("input {index} has {length} tokens; the model takes {limit} (limits.context)");
    Error::new(ErrorKind::ContextLengthExceeded, message)
}

/// Tokens that are left for text.
fn room(cut: Cut, wrapping: usize) -> Result<usize> {
    match cut.length.checked_sub(wrapping) {
        Some(room) if room > 0 => Ok(room),
        _ => {
            let length = cut.length;
            let message = format!("{length} tokens leave no room beside {wrapping} of wrapping");
            Err(Error::new(ErrorKind::InvalidRequest, message))
        }
    }
}

fn direction(side: Side) -> TruncationDirection {
    match side {
        Side::Left => TruncationDirection::Left,
        Side::Right => TruncationDirection::Right,
    }
}

pub(super) fn failed(error: tokenizers::Error) -> Error {
    Error::new(ErrorKind::Internal, format!("the text cannot be tokenised: {error}"))
}
