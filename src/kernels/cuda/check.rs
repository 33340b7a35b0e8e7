//! Whether a step fits a program, for kernels trust their tables.

use super::details::{DrawDetail, TOP_MAX, bytes_of_detail};
use super::lower::Lowered;
use super::tables::Work;
use crate::scheduler::step::MAX_SEATS;

/// What a lane's tables have room for.
#[derive(Debug, Clone, Copy)]
pub(super) struct Room {
    /// Entries of its table of pages: groups × layers.
    pub(super) places: u32,
    /// Super-pages of the device.
    pub(super) pages: u32,
    /// Layers with a KV cache.
    pub(super) layers: u32,
    /// Blocks of a super-page.
    pub(super) slots: u32,
    /// Bytes of details.
    pub(super) details: usize,
}

/// Whether the step fits the program.
pub(super) fn check(work: &Work, lowered: &Lowered, room: &Room) -> Result<(), String> {
    let batch = &work.batch;
    let rows = batch.tokens.len();
    if !batch.types.is_empty() && batch.types.len() != rows {
        return Err(format!("{rows} tokens, {} token types", batch.types.len()));
    }
    if batch.positions.len() != rows || batch.span_of.len() != rows {
        let (positions, spans) = (batch.positions.len(), batch.span_of.len());
        return Err(format!("{rows} tokens, {positions} positions, {spans} span numbers"));
    }
    if rows > lowered.rows_max {
        return Err(format!("{rows} rows, the workspace is for {}", lowered.rows_max));
    }
    let vectors = if lowered.choose.is_some() { 0 } else { batch.spans.len() };
    let answers = batch.gather.len().max(vectors);
    if answers > lowered.gathered_max || work.draws.len() > answers.min(MAX_SEATS) {
        let (most, draws) = (lowered.gathered_max, work.draws.len());
        return Err(format!("{answers} answers and {draws} draws, the limit is {most}"));
    }
    let positions = lowered.positions;
    if let Some(position) = batch.positions.iter().find(|position| **position >= positions) {
        return Err(format!("position {position}, the model has {positions}"));
    }
    if let Some(kind) = batch.types.iter().find(|kind| **kind >= lowered.types) {
        return Err(format!("token type {kind}, the model has {}", lowered.types));
    }
    details(work, room.details)?;
    if !work.states.is_empty() && lowered.hidden.is_none() {
        return Err("this model keeps no state of single tokens".into());
    }
    let mut next = 0;
    for (index, span) in batch.spans.iter().enumerate() {
        let (first, end) = (span.rows.start as usize, span.rows.end as usize);
        let whole = first == next && first < end && end <= rows;
        if !whole || batch.span_of[first..end].iter().any(|of| *of as usize != index) {
            return Err(format!("span {index} does not tile the rows"));
        }
        let seen = span.start as usize + end - first;
        let blocks = span.blocks.len() * crate::scheduler::step::BLOCK_TOKENS;
        let there = span.blocks.end as usize <= batch.blocks.len();
        if lowered.tiling.paged && (blocks < seen || !there) {
            return Err(format!("span {index} has {blocks} positions of KV, {seen} are needed"));
        }
        next = end;
    }
    let outside = batch.gather.iter().any(|row| *row as usize >= rows)
        || work.draws.iter().any(|draw| draw.row as usize >= batch.gather.len())
        || work.draws.iter().any(|draw| draw.seat as usize >= MAX_SEATS)
        || work.states.iter().any(|span| *span as usize >= batch.spans.len())
        || work.loans.iter().any(|loan| loan.place >= room.places || loan.page >= room.pages)
        || batch.copies.iter().flatten().any(|block| !room.has(*block))
        || lowered.tiling.paged && batch.blocks.iter().any(|block| !room.has(*block));
    if next != rows || outside {
        return Err("the step's tables contradict each other".into());
    }
    Ok(())
}

impl Room {
    /// Whether a block, (group, slot), has a place in every layer.
    fn has(&self, (group, slot): (u32, u32)) -> bool {
        let end = (u64::from(group) + 1) * u64::from(self.layers);
        end <= u64::from(self.places) && slot < self.slots
    }
}

/// Whether details are of draws, in their order, and of what there is.
fn details(work: &Work, room: usize) -> Result<(), String> {
    let ascending = work.details.is_sorted_by(|a, b| a.draw < b.draw);
    let fits = |detail: &DrawDetail| {
        (detail.draw as usize) < work.draws.len()
            && detail.generated.start <= detail.generated.end
            && detail.generated.end as usize <= work.history.len()
            && detail.last.is_none_or(|row| (row as usize) < work.batch.tokens.len())
    };
    if !ascending || !work.details.iter().all(fits) {
        return Err("the details of the step's draws contradict it".into());
    }
    if work.details.iter().any(|detail| bytes_of_detail(detail) > room) {
        return Err("a draw looks back at more tokens than the model's context".into());
    }
    let top = work.details.iter().filter_map(|detail| detail.detail.logprobs).max();
    match top {
        Some(top) if usize::from(top) > TOP_MAX => {
            Err(format!("log-probabilities of {top} tokens, at most {TOP_MAX} are known"))
        }
        _ => Ok(()),
    }
}
