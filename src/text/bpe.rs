//! Byte-level byte-pair encoding, as GGUF files with the `gpt2` tokenizer model mean it: split the
//! text by a pattern, then merge bytes by rank. Knows no control tokens.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};

use super::TextError;
use super::literal::{Literals, Part};
use super::split::{Scheme, Split};
use crate::error::{Error, ErrorKind, Result};
use crate::request::TokenId;

/// A byte-level BPE vocabulary.
#[derive(Debug)]
pub(super) struct Bpe {
    split: Split,
    /// Tokens that are found as they are written, also in plain text.
    literals: Literals,
    /// The token of each single byte; bytes without one are dropped, as in training.
    bytes: [Option<TokenId>; 256],
    /// A pair of neighbours: its rank and what it becomes.
    merges: HashMap<(TokenId, TokenId), (u32, TokenId)>,
    /// Tokens by their bytes, where pieces are looked up before merging.
    whole: Option<HashMap<Vec<u8>, TokenId>>,
}

impl Bpe {
    /// `plain` are the tokens that text can become, as their file writes them, `merges` are pairs
    /// with a space between, best first.
    ///
    /// # Errors
    /// A token appears twice, or a merge has no token.
    pub(super) fn new(
        scheme: &Scheme,
        plain: &HashMap<&str, TokenId>,
        literals: Literals,
        merges: &[&str],
    ) -> std::result::Result<Self, TextError> {
        let mut bytes = [None; 256];
        for (byte, char) in alphabet().into_iter().enumerate() {
            bytes[byte] = plain.get(char.encode_utf8(&mut [0; 4]) as &str).copied();
        }
        let mut ranked = HashMap::with_capacity(merges.len());
        for (rank, merge) in merges.iter().enumerate() {
            let of = |text: &str| {
                plain.get(text).copied().ok_or_else(|| {
                    TextError(format!("merge {merge:?} at {rank} needs {text:?}: no such token"))
                })
            };
            let (left, right) = merge
                .split_once(' ')
                .ok_or_else(|| TextError(format!("merge {merge:?} at {rank} is not a pair")))?;
            let pair = (of(left)?, of(right)?);
            let merged = of(&[left, right].concat())?;
            ranked.entry(pair).or_insert((rank as u32, merged));
        }
        let whole = scheme.whole_first.then(|| {
            let reverse = Alphabet::new();
            plain.iter().map(|(text, id)| (reverse.bytes(text), *id)).collect()
        });
        Ok(Self { split: Split::new(scheme)?, literals, bytes, merges: ranked, whole })
    }

    /// Appends the tokens of `text`.
    ///
    /// # Errors
    /// The text is 4 GiB or longer.
    pub(super) fn encode(&self, text: &str, ids: &mut Vec<TokenId>) -> Result<()> {
        if u32::try_from(text.len()).is_err() {
            return Err(Error::new(ErrorKind::TooLarge, "a text of 4 GiB or more"));
        }
        let mut merger = Merger::default();
        for part in self.literals.parts(text) {
            match part {
                Part::Token(id) => ids.push(id),
                Part::Text(text) => self.split.pieces(text, &mut |piece: &str| match self
                    .whole
                    .as_ref()
                    .and_then(|whole| whole.get(piece.as_bytes()))
                {
                    Some(id) => ids.push(*id),
                    None => merger.merge(self, piece.as_bytes(), ids),
                }),
            }
        }
        Ok(())
    }
}

/// A doubly linked list of tokens over one array, and the merges that may apply to it. Kept
/// between pieces for its memory.
#[derive(Debug, Default)]
struct Merger {
    symbols: Vec<Symbol>,
    /// Rank and the left symbol's place; what has changed since is found out when popped.
    queue: BinaryHeap<Reverse<(u32, u32)>>,
}

#[derive(Debug, Clone, Copy)]
struct Symbol {
    id: TokenId,
    before: u32,
    after: u32,
}

/// No neighbour on this side.
const NONE: u32 = u32::MAX;
/// The place of a symbol that was merged into its left neighbour points to itself.
const fn is_gone(symbol: Symbol, place: u32) -> bool {
    symbol.before == place
}

impl Merger {
    /// Appends the tokens of one piece: O(n log n) in its bytes.
    fn merge(&mut self, bpe: &Bpe, piece: &[u8], ids: &mut Vec<TokenId>) {
        self.symbols.clear();
        for id in piece.iter().filter_map(|byte| bpe.bytes[*byte as usize]) {
            let place = self.symbols.len() as u32;
            let before = place.checked_sub(1).unwrap_or(NONE);
            self.symbols.push(Symbol { id, before, after: place + 1 });
        }
        let Some(last) = self.symbols.last_mut() else { return };
        last.after = NONE;
        self.queue.clear();
        for left in 0..self.symbols.len() as u32 - 1 {
            self.consider(bpe, left);
        }
        while let Some(Reverse((rank, place))) = self.queue.pop() {
            let left = self.symbols[place as usize];
            if is_gone(left, place) || left.after == NONE {
                continue;
            }
            let right = self.symbols[left.after as usize];
            match bpe.merges.get(&(left.id, right.id)) {
                Some(&(now, merged)) if now == rank => self.join(bpe, place, merged),
                _ => continue,
            }
        }
        let mut place = 0;
        while place != NONE {
            let symbol = self.symbols[place as usize];
            ids.push(symbol.id);
            place = symbol.after;
        }
    }

    /// Queues the merge of the symbol at `left` with the one after it, if there is one.
    fn consider(&mut self, bpe: &Bpe, left: u32) {
        let Symbol { id, after, .. } = self.symbols[left as usize];
        if after == NONE {
            return;
        }
        let pair = (id, self.symbols[after as usize].id);
        if let Some(&(rank, _)) = bpe.merges.get(&pair) {
            self.queue.push(Reverse((rank, left)));
        }
    }

    /// Makes the symbol at `place` and the one after it one.
    fn join(&mut self, bpe: &Bpe, place: u32, merged: TokenId) {
        let Symbol { before, after: gone, .. } = self.symbols[place as usize];
        let after = self.symbols[gone as usize].after;
        self.symbols[gone as usize].before = gone;
        self.symbols[place as usize] = Symbol { id: merged, before, after };
        if after != NONE {
            self.symbols[after as usize].before = place;
        }
        self.consider(bpe, place);
        if before != NONE {
            self.consider(bpe, before);
        }
    }
}

/// How byte-level vocabularies write each byte: printable Latin-1 as itself, the others from
/// U+0100 on, in order (GPT-2).
pub(super) fn alphabet() -> [char; 256] {
    let mut next = 0x100;
    std::array::from_fn(|byte| match byte as u8 {
        printable @ (b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff) => char::from(printable),
        _ => {
            let char = char::from_u32(next).expect("at most 68 above U+0100, all assigned");
            next += 1;
            char
        }
    })
}

/// Turns tokens as they are written into the bytes that they stand for.
#[derive(Debug)]
pub(super) struct Alphabet(HashMap<char, u8>);

impl Alphabet {
    pub(super) fn new() -> Self {
        let chars = alphabet().into_iter().enumerate();
        Self(chars.map(|(byte, char)| (char, byte as u8)).collect())
    }

    /// The bytes of `text`; a character that stands for none stays as it is.
    pub(super) fn bytes(&self, text: &str) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(text.len());
        for char in text.chars() {
            match self.0.get(&char) {
                Some(byte) => bytes.push(*byte),
                None => bytes.extend_from_slice(char.encode_utf8(&mut [0; 4]).as_bytes()),
            }
        }
        bytes
    }
}
