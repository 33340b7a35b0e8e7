//! Tokens back to text, one at a time. Knows bytes and UTF-8, not how text became tokens.

use std::sync::Arc;

use super::{DecodeStream, Tokenizer};
use crate::request::TokenId;

/// What each token adds to a decoded text, by id.
#[derive(Debug, Default)]
pub(super) struct TokenBytes {
    bytes: Vec<u8>,
    /// Where each token's bytes end.
    ends: Vec<usize>,
}

impl TokenBytes {
    /// Adds the token with the next id.
    pub(super) fn push(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
        self.ends.push(self.bytes.len());
    }

    /// Number of ids.
    pub(super) fn len(&self) -> usize {
        self.ends.len()
    }

    /// The bytes of `id`; none for ids past the end, which padded output layers can give.
    pub(super) fn get(&self, id: TokenId) -> &[u8] {
        let id = id as usize;
        let Some(&end) = self.ends.get(id) else { return &[] };
        let start = id.checked_sub(1).map_or(0, |before| self.ends[before]);
        &self.bytes[start..end]
    }
}

impl DecodeStream {
    pub(super) fn new(tokenizer: Arc<Tokenizer>) -> Self {
        Self { tokenizer, pending: Vec::new() }
    }

    /// The text that `token` completes; may be empty. Bytes that can no longer become a
    /// character are U+FFFD at once.
    pub fn push(&mut self, token: TokenId) -> String {
        self.pending.extend_from_slice(self.tokenizer.bytes.get(token));
        let mut text = String::new();
        let mut done = 0;
        while done < self.pending.len() {
            let error = match std::str::from_utf8(&self.pending[done..]) {
                Ok(valid) => {
                    text.push_str(valid);
                    done = self.pending.len();
                    break;
                }
                Err(error) => error,
            };
            let valid = &self.pending[done..done + error.valid_up_to()];
            text.push_str(&String::from_utf8_lossy(valid));
            done += valid.len();
            let Some(invalid) = error.error_len() else { break };
            text.push(char::REPLACEMENT_CHARACTER);
            done += invalid;
        }
        self.pending.drain(..done);
        text
    }

    /// What is left at the end: an incomplete character becomes U+FFFD.
    pub fn finish(&mut self) -> String {
        let left = std::mem::take(&mut self.pending);
        String::from_utf8_lossy(&left).into_owned()
    }
}
