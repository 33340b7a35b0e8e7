//! Control tokens, and how a message's content is kept from forging them. Knows no template.

use std::borrow::Cow;
use std::collections::HashSet;

use super::TextError;
use super::literal::Literals;
use crate::request::TokenId;

/// A vocabulary's control tokens: role borders, ends of answers and the like.
#[derive(Debug, Default)]
pub(super) struct Controls {
    literals: Literals,
    ids: HashSet<TokenId>,
    /// Proper prefixes and proper suffixes of the tokens' texts.
    heads: HashSet<String>,
    tails: HashSet<String>,
    /// Characters of the longest text.
    chars_max: usize,
}

/// Longest text of a control token, in bytes: their prefixes and suffixes are all kept.
const TEXT_BYTES_MAX: usize = 256;

impl Controls {
    /// A token of fewer than two characters is never found in a text: nothing can be put inside
    /// it to break it.
    ///
    /// # Errors
    /// A token is too long, or there are too many.
    pub(super) fn new(tokens: Vec<(String, TokenId)>) -> Result<Self, TextError> {
        let ids = tokens.iter().map(|(_, id)| *id).collect();
        let (mut heads, mut tails, mut chars_max) = (HashSet::new(), HashSet::new(), 0);
        let mut found = Vec::new();
        for (text, id) in tokens {
            if text.len() > TEXT_BYTES_MAX {
                return Err(TextError(format!(
                    "control token {id} has {} bytes; the limit is {TEXT_BYTES_MAX}",
                    text.len()
                )));
            }
            for (middle, _) in text.char_indices().skip(1) {
                heads.insert(text[..middle].to_owned());
                tails.insert(text[middle..].to_owned());
            }
            chars_max = chars_max.max(text.chars().count());
            if text.chars().nth(1).is_some() {
                found.push((text, id));
            }
        }
        Ok(Self { literals: Literals::new(found)?, ids, heads, tails, chars_max })
    }

    /// Whether `id` is a control token.
    pub(super) fn contains(&self, id: TokenId) -> bool {
        self.ids.contains(&id)
    }

    /// What to search texts with.
    pub(super) fn literals(&self) -> &Literals {
        &self.literals
    }

    /// Byte offsets, ascending, at which something must be put into `content` so that no control
    /// token can be found in it, nor across its borders once a template has put text around it
    /// and perhaps trimmed it. Honest content has none, or one at a border.
    pub(super) fn cuts(&self, content: &str) -> Vec<usize> {
        let mut cuts = Vec::new();
        let mut from = 0;
        // Each start counts, also inside another match: cutting one token may uncover the next.
        while let Some((start, _)) = self.literals.find(content, from) {
            from = start + first_char(&content[start..]);
            cuts.push(from);
        }
        let trimmed = content.trim_start();
        let start = content.len() - trimmed.len();
        let trimmed = trimmed.trim_end();
        for (start, end) in [(0, content.len()), (start, start + trimmed.len())] {
            self.border_cuts(content, start, end, &mut cuts);
        }
        cuts.sort_unstable();
        cuts.dedup();
        cuts
    }

    /// Cuts at the borders of `content[start..end]` where it ends like the beginning of a control
    /// token, begins like the end of one, or is the middle of one.
    fn border_cuts(&self, content: &str, start: usize, end: usize, cuts: &mut Vec<usize>) {
        let view = &content[start..end];
        let mut near = view.char_indices().rev().take(self.chars_max);
        if near.any(|(at, _)| self.heads.contains(&view[at..])) {
            cuts.push(end);
        }
        let mut near = view.char_indices().skip(1).map(|(at, _)| at).chain([view.len()]);
        let tail = near.by_ref().take(self.chars_max).any(|at| self.tails.contains(&view[..at]));
        let short = !view.is_empty() && view.chars().nth(self.chars_max).is_none();
        if tail || (short && self.literals.texts().any(|text| text.contains(view))) {
            cuts.push(start);
        }
    }
}

/// `content` with `sentinel` at each of `cuts`.
pub(super) fn mark<'c>(content: &'c str, cuts: &[usize], sentinel: char) -> Cow<'c, str> {
    if cuts.is_empty() {
        return Cow::Borrowed(content);
    }
    let mut marked = String::with_capacity(content.len() + cuts.len() * sentinel.len_utf8());
    let mut done = 0;
    for &cut in cuts {
        marked.push_str(&content[done..cut]);
        marked.push(sentinel);
        done = cut;
    }
    marked.push_str(&content[done..]);
    Cow::Owned(marked)
}

fn first_char(text: &str) -> usize {
    text.chars().next().map_or(0, char::len_utf8)
}
