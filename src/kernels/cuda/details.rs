//! What few draws of a step ask for besides a token, as the kernel `refine` reads it: bias,
//! penalties, log-probabilities. Details go to the device apart from the step's tables, as many at
//! a time as fit.

use std::ops::Range;
use std::sync::Arc;

use bytemuck::{Pod, Zeroable, bytes_of, cast_slice};

use super::tables::Work;
use crate::device::cuda::Address;
use crate::request::{Detail, Logprobs, TokenId};

/// Tokens beside the chosen one that log-probabilities can be had of.
pub const TOP_MAX: usize = 20;

/// Biases of one draw that there is always room for.
const BIASES: usize = 1024;

/// Words of a draw's log-probabilities: `refine.cu`.
const SCORE_WORDS: usize = 2 + 2 * TOP_MAX;

/// The same as bytes.
pub(super) const SCORE_BYTES: usize = 4 * SCORE_WORDS;

/// No row, or no place.
const NOWHERE: u32 = u32::MAX;

/// What a draw is asked for besides.
#[derive(Debug, Clone, PartialEq)]
pub struct DrawDetail {
    /// Which draw of the step.
    pub draw: u32,
    /// What is asked for.
    pub detail: Detail,
    /// The prompt.
    pub prompt: Arc<[TokenId]>,
    /// The tokens generated so far, in `Work::history`.
    pub generated: Range<u32>,
    /// The row whose input is one more, if that is in a seat.
    pub last: Option<u32>,
}

#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
struct Header {
    count: u32,
    unused: u32,
    /// Details, biases, tokens.
    tables: [u64; 3],
}

#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
struct Entry {
    draw: u32,
    adjusted: u32,
    place: u32,
    top: u32,
    biases: [u32; 2],
    prompt: [u32; 2],
    answer: [u32; 2],
    last: u32,
    repetition: f32,
    frequency: f32,
    presence: f32,
}

/// Puts details together, in memory that is used again.
#[derive(Debug, Default)]
pub(super) struct DetailTables {
    entries: Vec<Entry>,
    biases: Vec<(u32, f32)>,
    tokens: Vec<u32>,
    bytes: Vec<u8>,
}

/// Bytes that hold at least one detail of a sequence of `context` tokens.
pub(super) fn detail_bytes(context: usize) -> usize {
    size_of::<Header>() + size_of::<Entry>() + 8 * BIASES + 4 * context + 64
}

/// Bytes that this detail takes at most.
pub(super) fn bytes_of_detail(wanted: &DrawDetail) -> usize {
    let Some(adjustment) = &wanted.detail.adjustment else { return detail_bytes(0) };
    let tokens = wanted.prompt.len() + wanted.generated.len();
    detail_bytes(tokens) + 8 * adjustment.bias.len().saturating_sub(BIASES)
}

/// How many of these details ask for log-probabilities.
pub(super) fn scored(details: &[DrawDetail]) -> usize {
    details.iter().filter(|detail| detail.detail.logprobs.is_some()).count()
}

/// Log-probabilities as the device wrote them.
pub(super) fn read_scores(bytes: &[u8]) -> impl Iterator<Item = Logprobs> {
    bytes.chunks_exact(SCORE_BYTES).map(|scores| {
        let words = scores.as_chunks::<4>().0;
        let float = |at: usize| f32::from_le_bytes(words[at]);
        let whole = |at: usize| u32::from_le_bytes(words[at]);
        let top = (0..(whole(1) as usize).min(TOP_MAX))
            .map(|place| (whole(2 + 2 * place), float(3 + 2 * place)));
        Logprobs { chosen: float(0), top: top.collect() }
    })
}

impl DetailTables {
    /// The tables of `work`'s details from number `from` on, for the address where they will lie,
    /// and how many: those that fit `room` bytes, one at least.
    pub(super) fn fill(
        &mut self,
        work: &Work,
        from: usize,
        (at, room): (Address, usize),
    ) -> (&[u8], usize) {
        self.entries.clear();
        self.biases.clear();
        self.tokens.clear();
        let mut place = scored(&work.details[..from]) as u32;
        for detail in &work.details[from..] {
            let (biases, tokens) = (self.biases.len(), self.tokens.len());
            let entry = self.entry(work, detail, &mut place);
            self.entries.push(entry);
            if self.entries.len() > 1 && self.bytes_needed() > room {
                self.entries.pop();
                self.biases.truncate(biases);
                self.tokens.truncate(tokens);
                break;
            }
        }
        self.bytes.clear();
        self.bytes.resize(size_of::<Header>(), 0);
        let tables = [
            put(&mut self.bytes, at, cast_slice(&self.entries)),
            {
                let pairs = self.biases.iter().map(|(token, bias)| [*token, bias.to_bits()]);
                let place = put(&mut self.bytes, at, &[]);
                pairs.for_each(|pair| self.bytes.extend_from_slice(bytes_of(&pair)));
                place
            },
            put(&mut self.bytes, at, cast_slice(&self.tokens)),
        ];
        let count = self.entries.len();
        let header = Header { count: count as u32, unused: 0, tables };
        self.bytes[..size_of::<Header>()].copy_from_slice(bytes_of(&header));
        (&self.bytes, count)
    }

    fn entry(&mut self, work: &Work, wanted: &DrawDetail, place: &mut u32) -> Entry {
        let DrawDetail { draw, detail, prompt, generated, last } = wanted;
        let mut entry = Entry {
            draw: *draw,
            adjusted: u32::from(detail.adjustment.is_some()),
            place: NOWHERE,
            top: u32::from(detail.logprobs.unwrap_or(0)),
            last: NOWHERE,
            repetition: 1.0,
            ..Entry::zeroed()
        };
        if detail.logprobs.is_some() {
            entry.place = *place;
            *place += 1;
        }
        let Some(adjustment) = &detail.adjustment else { return entry };
        entry.biases = append(&mut self.biases, &adjustment.bias);
        if adjustment.looks_back() {
            entry.repetition = adjustment.repetition;
            entry.frequency = adjustment.frequency;
            entry.presence = adjustment.presence;
            if adjustment.repetition != 1.0 {
                entry.prompt = append(&mut self.tokens, prompt);
            }
            let generated = generated.start as usize..generated.end as usize;
            entry.answer = append(&mut self.tokens, &work.history[generated]);
            entry.last = last.unwrap_or(NOWHERE);
        }
        entry
    }

    /// Bytes of what is there, with room for alignment.
    fn bytes_needed(&self) -> usize {
        let (entries, biases) = (self.entries.len(), self.biases.len());
        let entries = entries * size_of::<Entry>();
        size_of::<Header>() + entries + 8 * biases + 4 * self.tokens.len() + 64
    }
}

/// Appends values; says where they start and how many there are.
fn append<T: Copy>(to: &mut Vec<T>, values: &[T]) -> [u32; 2] {
    let first = to.len() as u32;
    to.extend_from_slice(values);
    [first, values.len() as u32]
}

/// Appends a table, aligned; says where it will lie.
fn put(bytes: &mut Vec<u8>, at: Address, table: &[u8]) -> u64 {
    let place = bytes.len().next_multiple_of(16);
    bytes.resize(place, 0);
    bytes.extend_from_slice(table);
    at.plus(place).0
}
