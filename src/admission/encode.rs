//! Tokenising for encoders: pairs of texts, and texts that may be cut to the model's limit.

use std::sync::Arc;

use super::{Entry, Front, check_characters, tokenising};
use crate::error::{Error, ErrorKind, Result};
use crate::request::Text;
use crate::text::encode::too_long;
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
        match cut {
            Some(cut) => shorten(&mut passages, limit as usize, cut.side),
            None => {
                for (index, passage) in passages.iter().enumerate() {
                    let characters = || passage.texts().map(|text| text.chars().count()).sum();
                    check_characters(index, passage.bytes(), characters, limit)?;
                }
            }
        }
        let segments = entry.model.encoder()?.segments;
        let tokenizer = Arc::clone(&entry.text.tokenizer);
        let bytes = passages.iter().map(Passage::bytes).sum();
        let encode = move || tokenizer.encode_passages(&passages, cut, limit as usize);
        let mut texts = self.heavy(tokenising(bytes), encode).await?;
        if !segments {
            texts.iter_mut().for_each(|text| text.second = None);
        }
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
    match lengths().find(|(_, length)| *length > limit as usize) {
        Some((index, length)) => Err(too_long(index, length, limit as usize)),
        None => Ok(()),
    }
}

/// Takes away what is certainly cut, before it is tokenised at length. What passages share, they
/// share afterwards.
fn shorten(passages: &mut [Passage], limit: usize, side: Side) {
    let most = limit * CHARACTERS_PER_KEPT_TOKEN_MAX;
    let mut last: Option<(Arc<str>, Arc<str>)> = None;
    for passage in passages {
        if let Some(second) = &mut passage.second
            && let Some(kept) = kept(second, most, side)
        {
            *second = kept.to_owned();
        }
        let known = last.take().filter(|(whole, _)| Arc::ptr_eq(whole, &passage.text));
        let short =
            known.map(|(_, short)| short).or_else(|| Some(kept(&passage.text, most, side)?.into()));
        if let Some(short) = short {
            let whole = std::mem::replace(&mut passage.text, Arc::clone(&short));
            last = Some((whole, short));
        }
    }
}

/// The `most` first or last characters of a text; none if it has no more.
fn kept(text: &str, most: usize, side: Side) -> Option<&str> {
    if text.len() <= most {
        return None;
    }
    match side {
        Side::Right => text.char_indices().nth(most).map(|(end, _)| &text[..end]),
        Side::Left => {
            let (start, _) = text.char_indices().nth_back(most - 1)?;
            (start > 0).then(|| &text[start..])
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_certainly_cut_goes_first() {
        assert_eq!(kept("abc", 3, Side::Right), None);
        assert_eq!(kept("éééé", 4, Side::Left), None, "more bytes than characters");
        assert_eq!(kept("éaéb", 2, Side::Right), Some("éa"));
        assert_eq!(kept("éaéb", 3, Side::Left), Some("aéb"));
    }

    #[test]
    fn a_shared_query_stays_shared() {
        let query: Arc<str> = "q".repeat(100).into();
        let pair = |second: &str| Passage { text: Arc::clone(&query), second: Some(second.into()) };
        let mut passages = vec![pair("a"), pair(&"b".repeat(65)), Passage::single("c")];
        shorten(&mut passages, 1, Side::Right);
        assert_eq!((passages[0].text.len(), passages[1].second.as_ref().unwrap().len()), (64, 64));
        assert!(Arc::ptr_eq(&passages[0].text, &passages[1].text));
        assert_eq!(&*passages[2].text, "c");
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
