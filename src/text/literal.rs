//! Tokens that are found in a text as they are written, before any splitting. Knows nothing of
//! what they mean.

use std::collections::HashMap;

use fancy_regex::{Regex, escape};

use super::TextError;
use crate::request::TokenId;

/// A set of literal tokens; the longest at the leftmost place wins.
#[derive(Debug, Default)]
pub(super) struct Literals {
    ids: HashMap<String, TokenId>,
    pattern: Option<Regex>,
}

/// A stretch of a text.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Part<'t> {
    /// No literal in it; not empty.
    Text(&'t str),
    /// A literal.
    Token(TokenId),
}

impl Literals {
    /// Empty texts are left out: they are everywhere.
    ///
    /// # Errors
    /// There are too many for one pattern.
    pub(super) fn new(tokens: Vec<(String, TokenId)>) -> Result<Self, TextError> {
        let ids: HashMap<_, _> = tokens.into_iter().filter(|(text, _)| !text.is_empty()).collect();
        if ids.is_empty() {
            return Ok(Self::default());
        }
        let mut texts: Vec<&String> = ids.keys().collect();
        texts.sort_unstable_by_key(|text| (std::cmp::Reverse(text.len()), *text));
        let escaped: Vec<_> = texts.iter().map(|text| escape(text)).collect();
        let pattern = Regex::new(&escaped.join("|")).map_err(|error| {
            TextError(format!("{} special tokens cannot be matched: {error}", ids.len()))
        })?;
        Ok(Self { ids, pattern: Some(pattern) })
    }

    /// The id of the literal that is exactly `text`.
    pub(super) fn id(&self, text: &str) -> Option<TokenId> {
        self.ids.get(text).copied()
    }

    /// Every literal.
    pub(super) fn texts(&self) -> impl Iterator<Item = &str> {
        self.ids.keys().map(String::as_str)
    }

    /// Where the first literal at or after `from` lies. The pattern has no look-around, so the
    /// search is linear and cannot fail.
    pub(super) fn find(&self, text: &str, from: usize) -> Option<(usize, usize)> {
        let found = self.pattern.as_ref()?.find_from_pos(text, from).ok()??;
        Some((found.start(), found.end()))
    }

    /// How the token is written; looks at all of them.
    pub(super) fn text(&self, id: TokenId) -> Option<&str> {
        self.ids.iter().find(|&(_, other)| *other == id).map(|(text, _)| text.as_str())
    }

    /// Cuts `text` at its literals.
    pub(super) fn parts<'t>(&'t self, text: &'t str) -> impl Iterator<Item = Part<'t>> {
        let mut done = 0;
        let mut next = None;
        std::iter::from_fn(move || {
            if let Some(id) = next.take() {
                return Some(Part::Token(id));
            }
            if done == text.len() {
                return None;
            }
            let before = done;
            let Some((start, end)) = self.find(text, done) else {
                done = text.len();
                return Some(Part::Text(&text[before..]));
            };
            done = end;
            let id = self.ids[&text[start..end]];
            if start == before {
                return Some(Part::Token(id));
            }
            next = Some(id);
            Some(Part::Text(&text[before..start]))
        })
    }
}
