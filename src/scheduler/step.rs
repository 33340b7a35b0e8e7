//! The contract between the scheduler, the engine and a runner: what one step computes and what
//! comes back. Plain data; knows no device, no clock and no channel.

use std::ops::Range;
use std::sync::Arc;

use crate::request::{Detail, LaneId, Logprobs, Micros, RequestId, Sampling, TenantId, TokenId};

/// Numbers planned steps; strictly increasing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct StepId(pub u64);

/// One of the device's execution slots: steps of a slot run in order, slots run side by side.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct SlotId(pub u8);

/// A generation's place in the device's token buffer, fixed while it runs. The sampler writes
/// the chosen token there, and the next step may read it before the host has seen it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Seat(pub u32);

/// A KV block: `BLOCK_TOKENS` positions of one sequence, at the same place in every layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockId {
    /// The lane's page group, an index into the lane's grants.
    pub group: u32,
    /// Which block of the group.
    pub slot: u32,
}

/// Makes a block equal to one of a committed step, of which its sequence shares the beginning. No
/// block is both in one step, and none is made twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockCopy {
    /// Stays as it is until the step has landed.
    pub from: BlockId,
    /// Of one of the step's spans, whose rows follow what is shared.
    pub to: BlockId,
}

impl BlockId {
    /// As kernels have it: group, slot.
    pub fn place(&self) -> (u32, u32) {
        (self.group, self.slot)
    }
}

impl BlockCopy {
    /// As kernels have it: from, to.
    pub fn places(&self) -> [(u32, u32); 2] {
        [self.from.place(), self.to.place()]
    }
}

/// Token positions in one KV block.
pub const BLOCK_TOKENS: usize = 32;

/// Places in a device's token buffer (seats): one for each sequence running at once over all lanes,
/// and [`TRIAL_SEAT`].
pub const MAX_SEATS: usize = 1024;

/// The seat that no sequence gets: for steps that the engine makes up to try a model.
pub const TRIAL_SEAT: Seat = Seat(MAX_SEATS as u32 - 1);

/// What a step is made of, as a metric label.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum StepKind {
    /// Prompt rows only.
    Prefill,
    /// One row a sequence.
    #[default]
    Decode,
    /// Both.
    Mixed,
    /// Encoder inputs.
    Encode,
}

/// Pages lent to a lane: one super-page for each of the model's layers. The runner keeps them as
/// `lane -> group -> [page of layer 0, page of layer 1, ...]`; a regrant of the same group
/// number replaces the pages.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Grant {
    /// The group's number in the lane.
    pub group: u32,
    /// Super-page index in the KV region, one a layer.
    pub pages: Vec<u32>,
}

/// One unit of device work: rows of one lane. Its vectors are reused from step to step.
///
/// Rows are packed without padding: `tokens[r]` is the input of row `r`, and each span owns a
/// contiguous range of rows.
#[derive(Debug, Clone, Default)]
pub struct Step {
    /// Strictly increasing.
    pub id: StepId,
    /// Whose rows these are.
    pub lane: LaneId,
    /// Where it runs.
    pub slot: SlotId,
    /// The mix.
    pub kind: StepKind,
    /// Sequences that take part.
    pub spans: Vec<Span>,
    /// Input token of each row. Ignored where the span's input is `Input::Seat`.
    pub tokens: Vec<TokenId>,
    /// Block tables of all spans, one after the other; empty for encoders.
    pub blocks: Vec<BlockId>,
    /// Blocks that are copied first, in all layers.
    pub copies: Vec<BlockCopy>,
    /// What the sampler needs besides, for the few spans that ask for it: in span order, and empty
    /// for most steps.
    pub details: Vec<SpanDetail>,
    /// Generated tokens that `details` point at.
    pub history: Vec<TokenId>,
    /// Page groups that the lane got since its last step; the runner takes them in first, also
    /// if the step then fails: steps planned after this one may use them already.
    pub grants: Vec<Grant>,
    /// What the cost model expects.
    pub predicted: Micros,
}

/// What a sampling span asks for besides its draw.
#[derive(Debug, Clone, PartialEq)]
pub struct SpanDetail {
    /// Which span of the step.
    pub span: u32,
    /// What is asked for.
    pub detail: Detail,
    /// The prompt.
    pub prompt: Arc<[TokenId]>,
    /// The tokens generated so far, in `Step::history`. One more is the span's own input where
    /// that is in a seat. Empty if the detail does not look back.
    pub generated: Range<u32>,
}

/// A contiguous piece of one sequence in a step.
#[derive(Debug, Clone, PartialEq)]
pub struct Span {
    /// Whose.
    pub request: RequestId,
    /// Who pays for it.
    pub tenant: TenantId,
    /// Which input of the request (0 for generations).
    pub part: u32,
    /// Its rows in the step.
    pub rows: Range<u32>,
    /// Position of the first row in its sequence; that many positions are in KV already.
    pub start: u32,
    /// Its block table in `Step::blocks`: covers positions `0 .. start + rows.len()`.
    pub blocks: Range<u32>,
    /// Where the input token is.
    pub input: Input,
    /// What becomes of the last row's hidden state (of all rows, for encoders).
    pub output: Output,
}

/// Where a span's input comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Input {
    /// `Step::tokens`.
    Known,
    /// `Step::tokens` of two texts, the second of which starts at this row of the span.
    Pair {
        /// Counted from the span's first row.
        second: u32,
    },
    /// One row, whose token an earlier, perhaps uncommitted step left in this seat.
    Seat(Seat),
}

/// What a span yields.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Output {
    /// Nothing: a prefill chunk that is not the last.
    None,
    /// One token, put into `seat` and into `Outcome::tokens`.
    Sample {
        /// Where the token goes on the device.
        seat: Seat,
        /// How it is chosen; the draw's counter is `position`.
        sampling: Sampling,
        /// Position of the new token in its sequence.
        position: u32,
    },
    /// An encoder's answer, one vector: appended to `Outcome::vectors`.
    Answer,
    /// The last hidden states of all rows, one after the other: appended to `Outcome::vectors` as
    /// one.
    Hidden,
}

/// What a step gave. Reused from step to step.
#[derive(Debug, Clone, Default)]
pub struct Outcome {
    /// Device time, measured.
    pub elapsed: Micros,
    /// One token for each span with `Output::Sample`, in span order.
    pub tokens: Vec<TokenId>,
    /// For each detail that asks for log-probabilities, in order.
    pub logprobs: Vec<Logprobs>,
    /// One vector for each span with `Output::Answer` or `Output::Hidden`, in span order.
    pub vectors: Vec<Vec<f32>>,
}

impl Step {
    /// Empties the step and keeps its memory.
    pub fn clear(&mut self) {
        self.spans.clear();
        self.tokens.clear();
        self.blocks.clear();
        self.copies.clear();
        self.details.clear();
        self.history.clear();
        self.grants.clear();
    }

    /// Number of rows (token positions) to compute.
    pub fn rows(&self) -> usize {
        self.tokens.len()
    }

    /// Whether of every row that yields something only the most likely token is wanted.
    pub fn is_greedy(&self) -> bool {
        let greedy = |span: &Span| match span.output {
            Output::None => true,
            Output::Sample { sampling, .. } => sampling.is_greedy(),
            Output::Answer | Output::Hidden => false,
        };
        self.details.is_empty() && self.spans.iter().all(greedy)
    }

    /// The block table of `span`.
    pub fn table(&self, span: &Span) -> &[BlockId] {
        &self.blocks[span.blocks.start as usize..span.blocks.end as usize]
    }
}

impl Outcome {
    /// Empties the outcome and keeps its memory.
    pub fn clear(&mut self) {
        self.elapsed = Micros(0);
        self.tokens.clear();
        self.logprobs.clear();
        self.vectors.clear();
    }
}

impl Span {
    /// Number of rows.
    pub fn len(&self) -> usize {
        (self.rows.end - self.rows.start) as usize
    }

    /// A span has at least one row.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_is_greedy_if_all_that_it_yields_is() {
        let sample = |temperature| Output::Sample {
            seat: TRIAL_SEAT,
            sampling: Sampling { temperature, ..Sampling::default() },
            position: 1,
        };
        let span = |output| Span {
            request: RequestId(1),
            tenant: TenantId(0),
            part: 0,
            rows: 0..1,
            start: 0,
            blocks: 0..1,
            input: Input::Known,
            output,
        };
        let step = |outputs: &[Output]| Step {
            spans: outputs.iter().copied().map(span).collect(),
            ..Step::default()
        };
        assert!(step(&[Output::None, sample(0.0), sample(0.0)]).is_greedy());
        assert!(!step(&[sample(0.0), sample(0.1)]).is_greedy(), "one is drawn");
        assert!(!step(&[sample(0.0), Output::Answer]).is_greedy());
        let mut detailed = step(&[sample(0.0)]);
        let (prompt, detail) = ([1].into(), Detail::default());
        detailed.details.push(SpanDetail { span: 0, detail, prompt, generated: 0..0 });
        assert!(!detailed.is_greedy(), "log-probabilities are of all tokens");
    }
}
