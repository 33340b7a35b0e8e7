//! What all endpoints of encoders share: inputs to tokens, through the engine, and the answers as
//! the caller wants them. Knows no wire format.

use tokio::time::timeout_at;

use super::answer;
use super::input::{Input, check_ids};
use crate::admission::encode::check_lengths;
use crate::admission::ticket::Ticket;
use crate::admission::{Entry, Front};
use crate::catalog::Model;
use crate::error::{Error, ErrorKind, Result};
use crate::model::EncoderCard;
use crate::request::{Encode, Event, Events, Task, Text, Usage, Yield};
use crate::text::{Cut, Passage, Side};

/// Most inputs in one request: the OpenAI API's own limit.
pub(super) const INPUTS_MAX: usize = 2048;

/// What an encoder said.
#[derive(Debug)]
pub(super) struct Encoded {
    /// One for each input.
    pub(super) vectors: Vec<Vec<f32>>,
    pub(super) usage: Usage,
}

/// What becomes of a vector before it is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Finish {
    /// How many of its values are kept.
    pub(super) dimensions: usize,
    /// Whether it is scaled to unit length; a zero vector stays zero.
    pub(super) normalize: bool,
}

impl Finish {
    /// What `model` and the caller's wishes make of vectors. What was shortened is scaled anew.
    ///
    /// # Errors
    /// `Unsupported` for fewer dimensions than the model has, unless it was trained for that.
    pub(super) fn new(
        model: &Model,
        card: &EncoderCard,
        normalize: Option<bool>,
        dimensions: Option<u64>,
    ) -> Result<Self> {
        let own = u64::from(card.width);
        let wanted = dimensions.unwrap_or(own);
        if wanted == 0 || wanted > own {
            let message = format!("'dimensions' is {wanted}; '{}' has 1 to {own}", model.name);
            return Err(Error::invalid("dimensions", message));
        }
        if wanted < own && !card.matryoshka {
            let message = format!(
                "'dimensions' is {wanted}; vectors of '{}' have {own} and it is not known to be \
                 trained for fewer ('matryoshka' in its manifest)",
                model.name
            );
            return Err(Error::new(ErrorKind::Unsupported, message).at("dimensions"));
        }
        let normalize = normalize.unwrap_or(card.normalize || wanted < own);
        Ok(Self { dimensions: wanted as usize, normalize })
    }

    /// Does it.
    pub(super) fn apply(self, vector: &mut Vec<f32>) {
        vector.truncate(self.dimensions);
        if self.normalize {
            let squares: f64 = vector.iter().map(|&value| f64::from(value).powi(2)).sum();
            if squares > 0.0 {
                let inverse = 1.0 / squares.sqrt();
                vector.iter_mut().for_each(|value| *value = (f64::from(*value) * inverse) as f32);
            }
        }
    }
}

/// How long inputs are shortened for `model`, if they may be.
pub(super) fn cut(model: &Model, truncate: bool, side: Side) -> Option<Cut> {
    truncate.then_some(Cut { length: model.context() as usize, second: usize::MAX, side })
}

/// Tokens of what an endpoint was given in its field `param`. Token ids are taken as they are.
///
/// # Errors
/// `InvalidRequest` for an empty input, or an id that the model does not have;
/// `ContextLengthExceeded` for what is too long and may not be cut.
pub(super) async fn tokens(
    front: &Front,
    entry: Entry<'_>,
    input: Input,
    cut: Option<Cut>,
    param: &'static str,
) -> Result<Vec<Text>> {
    let (texts, mut lists) = match input {
        Input::Text(text) => (vec![text], vec![]),
        Input::Texts(texts) => (texts, vec![]),
        Input::Tokens(tokens) => (vec![], vec![tokens]),
        Input::TokenLists(lists) => (vec![], lists),
    };
    if texts.is_empty() && lists.is_empty() {
        return Err(Error::invalid(param, format!("'{param}' is an empty array")));
    }
    let empty = texts.iter().position(String::is_empty);
    if let Some(index) = empty.or_else(|| lists.iter().position(Vec::is_empty)) {
        return Err(Error::invalid(param, format!("'{param}' has an empty input ({index})")));
    }
    if !texts.is_empty() {
        let passages = texts.into_iter().map(Passage::single).collect();
        let texts = front.encode_passages(entry, passages, cut).await;
        return texts.map_err(|error| error.at(param));
    }
    check_ids(entry.text, &lists, param)?;
    if let Some(cut) = cut {
        for list in &mut lists {
            match cut.side {
                Side::Right => list.truncate(cut.length),
                Side::Left => drop(list.drain(..list.len().saturating_sub(cut.length))),
            }
        }
    }
    let texts: Vec<Text> = lists.into_iter().map(Text::single).collect();
    check_lengths(&texts, entry.model.context()).map_err(|error| error.at(param))?;
    Ok(texts)
}

/// Submits inputs and waits for every answer, until the ticket's time is over.
///
/// # Errors
/// Whatever admission or the engine refuses; `Internal` for an answer that is not numbers.
pub(super) async fn run(
    front: &Front,
    ticket: &mut Ticket,
    model: &Model,
    inputs: Vec<Text>,
    yields: Yield,
) -> Result<Encoded> {
    let count = inputs.len();
    let task = Task::Encode(Encode { inputs, yields });
    let mut receivers = front.submit(ticket, model, vec![task])?;
    let events = receivers.pop().expect("one task, one receiver");
    match timeout_at(ticket.expires(), collect(events, count)).await {
        Ok(encoded) => encoded,
        Err(_) => Err(ticket.expired()),
    }
}

async fn collect(mut events: Events, count: usize) -> Result<Encoded> {
    let mut vectors: Vec<Vec<f32>> = vec![Vec::new(); count];
    let usage = loop {
        match events.recv().await.ok_or_else(answer::gone)? {
            Event::Vector { index, values } => vectors[index as usize] = values,
            Event::Done { usage, .. } => break usage,
            Event::Failed(error) => return Err(error),
            Event::Started { .. } | Event::Token(_) | Event::Scored { .. } => {
                return Err(Error::new(ErrorKind::Internal, "a token came from an encoder"));
            }
        }
    };
    let finite = |vector: &Vec<f32>| vector.iter().all(|value| value.is_finite());
    match vectors.iter().position(|vector| vector.is_empty() || !finite(vector)) {
        None => Ok(Encoded { vectors, usage }),
        Some(index) => {
            let message = format!("the vector of input {index} is missing or not finite");
            Err(Error::new(ErrorKind::Internal, message))
        }
    }
}

/// A classifier's scores as probabilities: each of its own, or shared among the labels.
pub(super) fn probabilities(card: &EncoderCard, scores: &mut [f32]) {
    if card.independent {
        scores.iter_mut().for_each(|score| *score = sigmoid(*score));
        return;
    }
    let peak = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    scores.iter_mut().for_each(|score| *score = (*score - peak).exp());
    let total: f32 = scores.iter().sum();
    scores.iter_mut().for_each(|score| *score /= total);
}

fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scores_become_probabilities() {
        let mut card = EncoderCard { independent: true, ..EncoderCard::default() };
        let mut scores = [0.0, 100.0, -100.0];
        probabilities(&card, &mut scores);
        assert_eq!(scores[..2], [0.5, 1.0]);
        assert!((0.0..1e-30).contains(&scores[2]));
        card.independent = false;
        let mut scores = [1000.0, 1000.0 + 3f32.ln()];
        probabilities(&card, &mut scores);
        assert!((scores[0] - 0.25).abs() < 1e-4 && (scores[1] - 0.75).abs() < 1e-4, "{scores:?}");
    }

    #[test]
    fn vectors_are_cut_then_scaled() {
        let mut vector = vec![3.0, 4.0, 12.0];
        Finish { dimensions: 2, normalize: true }.apply(&mut vector);
        assert_eq!(vector, [0.6, 0.8]);
        let mut zero = vec![0.0; 2];
        Finish { dimensions: 2, normalize: true }.apply(&mut zero);
        assert_eq!(zero, [0.0; 2]);
    }
}
