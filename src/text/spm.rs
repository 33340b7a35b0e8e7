//! SentencePiece vocabularies, as GGUF files with the `llama` tokenizer model mean them: merge the
//! neighbours whose union has the best score, and write what has no token byte by byte. Knows no
//! control tokens.

use std::cmp::Ordering;
use std::collections::{BinaryHeap, HashMap};

use super::TextError;
use super::huggingface::written_byte;
use super::literal::{Literals, Part};
use crate::error::{Error, ErrorKind, Result};
use crate::request::TokenId;

/// What a space is written as.
pub(super) const SPACE: char = '\u{2581}';

/// A SentencePiece vocabulary.
#[derive(Debug)]
pub(super) struct Spm {
    /// Tokens that text can become, with their scores.
    tokens: HashMap<String, (TokenId, f32)>,
    /// Bytes of the longest of them: unions beyond are not looked up.
    bytes_max: usize,
    /// Tokens that are found as they are written.
    literals: Literals,
    /// The token of each single byte.
    bytes: [Option<TokenId>; 256],
    /// What stands for a byte that has no token.
    unknown: Option<TokenId>,
    /// Whether a space goes before a text, and again after each literal.
    space_before: bool,
}

/// A token as its file writes it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Piece<'t> {
    pub(super) text: &'t str,
    pub(super) id: TokenId,
    pub(super) score: f32,
    /// It stands for the byte that is written in hexadecimal.
    pub(super) byte: bool,
}

impl Spm {
    /// # Errors
    /// A token appears twice, has no number as score, or is no byte though it says so.
    pub(super) fn new(
        pieces: &[Piece<'_>],
        literals: Literals,
        unknown: Option<TokenId>,
        space_before: bool,
    ) -> std::result::Result<Self, TextError> {
        let mut tokens = HashMap::with_capacity(pieces.len());
        let (mut bytes, mut bytes_max) = ([None; 256], 0);
        for &Piece { text, id, score, byte } in pieces {
            if byte {
                let byte = written_byte(text)
                    .ok_or_else(|| TextError(format!("byte token {id} is written {text:?}")))?;
                bytes[usize::from(byte)] = Some(id);
                continue;
            }
            if score.is_nan() {
                return Err(TextError(format!("the score of token {id} is not a number")));
            }
            bytes_max = bytes_max.max(text.len());
            if tokens.insert(text.to_owned(), (id, score)).is_some() {
                return Err(TextError(format!("token {text:?} appears twice, again as {id}")));
            }
        }
        Ok(Self { tokens, bytes_max, literals, bytes, unknown, space_before })
    }

    /// Appends the tokens of `text`: O(n log n) in its length.
    ///
    /// # Errors
    /// The text is 1 GiB or longer.
    pub(super) fn encode(&self, text: &str, ids: &mut Vec<TokenId>) -> Result<()> {
        // A space becomes three bytes, and places are 32-bit.
        if text.len() >= 1 << 30 {
            return Err(Error::new(ErrorKind::TooLarge, "a text of 1 GiB or more"));
        }
        let mut merger = Merger::default();
        let mut after_token = true;
        for part in self.literals.parts(text) {
            match part {
                Part::Token(id) => ids.push(id),
                Part::Text(text) => {
                    let mut written = String::with_capacity(text.len() + text.len() / 4 + 3);
                    if self.space_before && after_token {
                        written.push(SPACE);
                    }
                    written.extend(text.chars().map(|c| if c == ' ' { SPACE } else { c }));
                    merger.merge(self, &written, ids);
                }
            }
            after_token = matches!(part, Part::Token(_));
        }
        Ok(())
    }

    /// Whether decoding takes the first space off again.
    pub(super) fn space_before(&self) -> bool {
        self.space_before
    }

    /// The tokens of a stretch that no token has.
    fn spell(&self, text: &str, ids: &mut Vec<TokenId>) {
        let byte = |byte: u8| self.bytes[usize::from(byte)].or(self.unknown);
        ids.extend(text.bytes().filter_map(byte));
    }
}

/// A doubly linked list of stretches of one text, and the unions that may come next. Kept between
/// texts for its memory.
#[derive(Debug, Default)]
struct Merger {
    symbols: Vec<Symbol>,
    queue: BinaryHeap<Union>,
}

/// A stretch of the text; empty once it is part of its left neighbour.
#[derive(Debug, Clone, Copy)]
struct Symbol {
    start: u32,
    bytes: u32,
    before: u32,
    after: u32,
}

/// No neighbour on this side.
const NONE: u32 = u32::MAX;

/// Two neighbours whose union is a token; what has changed since is found out when it is popped.
#[derive(Debug, Clone, Copy)]
struct Union {
    score: f32,
    left: u32,
    right: u32,
    bytes: u32,
}

/// The best score first, and of equal ones the leftmost.
impl Ord for Union {
    fn cmp(&self, other: &Self) -> Ordering {
        self.score.total_cmp(&other.score).then_with(|| other.left.cmp(&self.left))
    }
}

impl PartialOrd for Union {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Union {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Union {}

impl Merger {
    fn merge(&mut self, spm: &Spm, text: &str, ids: &mut Vec<TokenId>) {
        self.symbols.clear();
        self.queue.clear();
        for (place, (start, char)) in (0..).zip(text.char_indices()) {
            let bytes = char.len_utf8() as u32;
            let before = if place == 0 { NONE } else { place - 1 };
            self.symbols.push(Symbol { start: start as u32, bytes, before, after: place + 1 });
        }
        let Some(last) = self.symbols.last_mut() else { return };
        last.after = NONE;
        for right in 1..self.symbols.len() as u32 {
            self.consider(spm, text, right - 1, right);
        }
        while let Some(Union { left, right, bytes, .. }) = self.queue.pop() {
            let [a, b] = [left, right].map(|place| self.symbols[place as usize]);
            // Longer by now, or gone: the union is another one.
            if a.bytes == 0 || b.bytes == 0 || a.bytes + b.bytes != bytes {
                continue;
            }
            self.symbols[right as usize].bytes = 0;
            let Symbol { start, before, .. } = a;
            self.symbols[left as usize] = Symbol { start, bytes, before, after: b.after };
            if b.after != NONE {
                self.symbols[b.after as usize].before = left;
                self.consider(spm, text, left, b.after);
            }
            if before != NONE {
                self.consider(spm, text, before, left);
            }
        }
        let mut place = 0;
        while place != NONE {
            let Symbol { start, bytes, after, .. } = self.symbols[place as usize];
            let written = &text[start as usize..(start + bytes) as usize];
            match spm.tokens.get(written) {
                Some((id, _)) => ids.push(*id),
                None => spm.spell(written, ids),
            }
            place = after;
        }
    }

    /// Queues the union of two neighbours if it is a token.
    fn consider(&mut self, spm: &Spm, text: &str, left: u32, right: u32) {
        let [a, b] = [left, right].map(|place| self.symbols[place as usize]);
        let bytes = a.bytes + b.bytes;
        if bytes as usize > spm.bytes_max {
            return;
        }
        let written = &text[a.start as usize..(a.start + bytes) as usize];
        if let Some(&(_, score)) = spm.tokens.get(written) {
            self.queue.push(Union { score, left, right, bytes });
        }
    }
}
