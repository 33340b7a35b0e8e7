//! Tokenising for encoders: pairs of texts, and texts that may be cut to the model's limit.

use std::sync::Arc;

use super::{Entry, Front, check_characters, tokenising};
use crate::error::{Error, ErrorKind, Result};
use crate::request::Text;
use crate::text::{Cut, Passage, Side};

/// Of a text that may be cut, no more characters than this a token of the limit are looked at.
const CHARACTERS_PER_KEPT_TOKEN_MAX: usize = 64;

impl Front {
    /// Token ids of each passage, wrapped as the model wants it; shortened to its limit if there
    /// is a `cut`, whose `length` is at most that.
    ///
    /// # Errors
    /// `ContextLengthExceeded` for a passage above the limit that may not be cut, naming its index
    /// and length; `InvalidRequest` for one without tokens.
    pub async fn encode_passages(
        &self,
        entry: Entry<'_>,
        mut passages: Vec<Passage>,
        cut: Option<Cut>,
    ) -> Result<Vec<Text>> {
        let limit = entry.model.context();
        for (index, passage) in passages.iter_mut().enumerate() {
            match cut {
                Some(cut) => shorten(passage, limit as usize, cut.side),
                None => check_characters(
                    index,
                    passage.bytes(),
                    || passage.texts().map(|text| text.chars().count()).sum(),
                    limit,
                )?,
            }
        }
        let segments = entry.model.encoder()?.segments;
        let tokenizer = Arc::clone(&entry.text.tokenizer);
        let bytes = passages.iter().map(Passage::bytes).sum();
        let texts: Vec<Text> = self
            .heavy(tokenising(bytes), move || {
                let encode = |passage: &Passage| tokenizer.encode_passage(passage, cut);
                let typed = |text: Text| Text { second: text.second.filter(|_| segments), ..text };
                passages.iter().map(|passage| encode(passage).map(typed)).collect()
            })
            .await?;
        check_lengths(&texts, limit)?;
        Ok(texts)
    }
}

/// Whether every input has tokens, and no more than `limit`.
///
/// # Errors
/// `InvalidRequest` and `ContextLengthExceeded`, naming the first that has not.
pub fn check_lengths(texts: &[Text], limit: u32) -> Result<()> {
    let lengths = || texts.iter().map(|text| text.tokens.len()).enumerate();
    if let Some((index, _)) = lengths().find(|(_, length)| *length == 0) {
        let message = format!("input {index} has no tokens; at least 1 is needed");
        return Err(Error::new(ErrorKind::InvalidRequest, message));
    }
    let Some((index, length)) = lengths().find(|(_, length)| *length > limit as usize) else {
        return Ok(());
    };
    let message =
        format!("input {index} has {length} tokens; the model takes {limit} (limits.context)");
    Err(Error::new(ErrorKind::ContextLengthExceeded, message))
}

/// Takes away what is certainly cut, before it is tokenised at length.
fn shorten(passage: &mut Passage, limit: usize, side: Side) {
    let most = limit * CHARACTERS_PER_KEPT_TOKEN_MAX;
    for text in [Some(&mut passage.text), passage.second.as_mut()].into_iter().flatten() {
        if text.len() <= most {
            continue;
        }
        match side {
            Side::Right => {
                if let Some((end, _)) = text.char_indices().nth(most) {
                    text.truncate(end);
                }
            }
            Side::Left => {
                if let Some((start, _)) = text.char_indices().nth_back(most - 1) {
                    text.drain(..start);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_certainly_cut_goes_first() {
        let passage = |text: String| Passage { text, second: None };
        let mut long = passage("é".repeat(100) + "end");
        shorten(&mut long, 1, Side::Right);
        assert_eq!(long.text, "é".repeat(64));
        let mut long = passage("é".repeat(100) + "end");
        shorten(&mut long, 1, Side::Left);
        assert_eq!(long.text, "é".repeat(61) + "end");
        let mut short = Passage { text: "a".into(), second: Some("b".repeat(65)) };
        shorten(&mut short, 1, Side::Left);
        assert_eq!((short.text.len(), short.second.unwrap().len()), (1, 64));
    }

    #[test]
    fn lengths_are_told_with_their_index() {
        let texts = |lengths: &[usize]| -> Vec<Text> {
            lengths.iter().map(|&length| Text::single(vec![0; length])).collect()
        };
        check_lengths(&texts(&[1, 4]), 4).unwrap();
        let empty = check_lengths(&texts(&[1, 0]), 4).unwrap_err();
        assert_eq!(empty.kind(), ErrorKind::InvalidRequest);
        let long = check_lengths(&texts(&[1, 5]), 4).unwrap_err();
        assert_eq!(long.kind(), ErrorKind::ContextLengthExceeded);
        assert!(long.message().contains("input 1 has 5 tokens"), "{long}");
    }
}
