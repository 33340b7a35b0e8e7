//! What is done to a row of logits before a token is drawn: bias and penalties. Knows no draw.

use crate::request::{Adjustment, TokenId};

/// The text that a token continues.
#[derive(Debug, Clone, Copy, Default)]
pub struct Past<'a> {
    /// What was given.
    pub prompt: &'a [TokenId],
    /// What was generated.
    pub generated: &'a [TokenId],
    /// One more generated token, if the host did not know it yet when it made the step.
    pub last: Option<TokenId>,
}

/// In a tally: the token stands in the prompt. The other bits count it in the answer.
const IN_PROMPT: u32 = 1 << 31;

/// Memory for one row at a time, which grows with the vocabulary and is kept.
#[derive(Debug, Default)]
pub(super) struct Adjuster {
    row: Vec<f32>,
    /// By token; zero between rows.
    tally: Vec<u32>,
    /// Tokens whose tally is not zero.
    seen: Vec<TokenId>,
}

impl Adjuster {
    /// `logits` as `adjustment` says, see [`Adjustment`]. Tokens beyond the row are passed over.
    pub(super) fn apply(
        &mut self,
        logits: &[f32],
        adjustment: &Adjustment,
        past: Past<'_>,
    ) -> &[f32] {
        self.row.clear();
        self.row.extend_from_slice(logits);
        for &(token, bias) in &adjustment.bias {
            if let Some(logit) = self.row.get_mut(token as usize) {
                *logit += bias;
            }
        }
        if adjustment.looks_back() {
            self.count(adjustment, past);
            self.penalise(adjustment);
        }
        &self.row
    }

    fn count(&mut self, adjustment: &Adjustment, past: Past<'_>) {
        if self.tally.len() < self.row.len() {
            self.tally.resize(self.row.len(), 0);
        }
        let mut note = |token: TokenId, change: fn(u32) -> u32| {
            if let Some(tally) = self.tally.get_mut(token as usize) {
                if *tally == 0 {
                    self.seen.push(token);
                }
                *tally = change(*tally);
            }
        };
        if adjustment.repetition != 1.0 {
            past.prompt.iter().for_each(|&token| note(token, |tally| tally | IN_PROMPT));
        }
        let generated = past.generated.iter().copied().chain(past.last);
        generated.for_each(|token| note(token, |tally| tally + 1));
    }

    /// Also empties the tally.
    fn penalise(&mut self, adjustment: &Adjustment) {
        let Adjustment { repetition, frequency, presence, .. } = *adjustment;
        for token in self.seen.drain(..) {
            let count = std::mem::take(&mut self.tally[token as usize]) & !IN_PROMPT;
            // A row may be shorter than the one before it.
            let Some(logit) = self.row.get_mut(token as usize) else { continue };
            *logit = if *logit > 0.0 { *logit / repetition } else { *logit * repetition };
            if count > 0 {
                *logit -= frequency * count as f32 + presence;
            }
        }
    }
}
