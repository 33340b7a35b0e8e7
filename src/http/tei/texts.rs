//! `/tokenize` and `/decode`: what a model's tokenizer does, for any model.

use std::sync::Arc;
use std::time::Instant;

use axum::extract::Request;

use super::refusal::Refusal;
use super::wire::{DecodeBody, Token, TokenizeBody};
use super::{Call, Done, ENCODERS};
use crate::admission::{Entry, Front};
use crate::error::Error;
use crate::http::body;
use crate::http::encode::INPUTS_MAX;
use crate::request::{Micros, Usage};

/// Bytes of text that become tokens with their places, and back, in a microsecond.
const BYTES_PER_MICRO: usize = 2;

/// Most tokens of an answer.
const TOKENS_MAX: usize = 1 << 18;

/// The tokens of each text.
pub(super) async fn tokenize(call: &mut Call, request: Request) -> Result<Done, Refusal> {
    let front = call.front.clone();
    let body: TokenizeBody = body::json(&front, &mut call.ticket, request).await?;
    let texts = body.inputs.list();
    if texts.is_empty() {
        return Err(Refusal::empty("inputs"));
    }
    if texts.len() > INPUTS_MAX {
        return Err(Refusal::too_many(texts.len(), INPUTS_MAX));
    }
    let Entry { text, .. } = enter(call, &front, body.model.as_ref())?;
    let tokenizer = Arc::clone(&text.tokenizer);
    let bytes: usize = texts.iter().map(String::len).sum();
    let characters = texts.iter().map(|text| text.chars().count()).sum();
    let started = Instant::now();
    let wrap = body.add_special_tokens.unwrap_or(true);
    let job = move || {
        let mut lists = Vec::new();
        let mut count = 0;
        for text in &texts {
            lists.push(tokenizer.pieces(text, wrap)?);
            count += lists.last().map_or(0, Vec::len);
            if count > TOKENS_MAX {
                let message = format!("the inputs have more than {TOKENS_MAX} tokens");
                return Err(Error::new(crate::error::ErrorKind::TooLarge, message));
            }
        }
        let token = |piece| Token::from(piece);
        let shown: Vec<Vec<Token<'_>>> =
            lists.iter().map(|pieces| pieces.iter().map(token).collect()).collect();
        Ok(serde_json::to_vec(&shown).expect("strings and numbers always serialise"))
    };
    let json = front.heavy(Micros((bytes / BYTES_PER_MICRO) as u64), job).await?;
    Ok(Done { json, usage: Usage::default(), characters, tokenised: started.elapsed() })
}

/// The text of each list of ids.
pub(super) async fn decode(call: &mut Call, request: Request) -> Result<Done, Refusal> {
    let front = call.front.clone();
    let body: DecodeBody = body::json(&front, &mut call.ticket, request).await?;
    let lists = body.ids.list();
    if lists.is_empty() || lists.iter().any(Vec::is_empty) {
        return Err(Refusal::empty("ids"));
    }
    if lists.len() > INPUTS_MAX {
        return Err(Refusal::too_many(lists.len(), INPUTS_MAX));
    }
    let Entry { text, .. } = enter(call, &front, body.model.as_ref())?;
    let tokenizer = Arc::clone(&text.tokenizer);
    let count: usize = lists.iter().map(Vec::len).sum();
    let skip = body.skip_special_tokens.unwrap_or(true);
    let job = move || {
        let decode = |ids: &Vec<u32>| tokenizer.decode_for_people(ids, skip);
        let texts = lists.iter().map(decode).collect::<Result<Vec<String>, Error>>()?;
        Ok(serde_json::to_vec(&texts).expect("strings always serialise"))
    };
    let json = front.heavy(Micros((4 * count / BYTES_PER_MICRO) as u64), job).await?;
    Ok(Done { json, usage: Usage::default(), characters: 0, tokenised: Default::default() })
}

/// Any model by name, or the only encoder.
fn enter<'a>(
    call: &mut Call,
    front: &'a Front,
    in_body: Option<&String>,
) -> Result<Entry<'a>, Refusal> {
    let model = match call.name.as_ref().or(in_body) {
        Some(name) => front.catalog.find(name)?,
        None => front.catalog.only(&ENCODERS)?,
    };
    Ok(front.enter_model(&mut call.ticket, model)?)
}
