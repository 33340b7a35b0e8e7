//! Chooses the next token from one row of logits. The draw is a function of (seed, choice,
//! position) and the logits alone. Knows no model, no text and no grammar.
//!
//! Probabilities are 32-bit fixed point, 2^30 for the most likely token: sums of integers are the
//! same in any order, so filters and draws need no agreed order of additions and no sort. What is
//! less likely than 2^-31 of the most likely token is never drawn.

#![allow(unsafe_code)]

pub mod adjust;
mod logprobs;

use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use crate::kernels::cpu::isa::{Isa, LANES, Set, SetKind, Task};
use crate::kernels::cpu::math;
use crate::request::{Adjustment, Logprobs, Sampling, TokenId};
use adjust::{Adjuster, Past};

/// The weight of the most likely token.
const ONE: u32 = 1 << 30;

/// Chooses tokens; holds the scratch memory for one row at a time.
#[derive(Debug)]
pub struct Sampler {
    set: Set,
    /// Weight of each token.
    weights: Vec<u32>,
    /// Candidates of a filter.
    keys: Vec<Key>,
    /// Empty until a row is adjusted.
    adjuster: Adjuster,
}

impl Sampler {
    /// A sampler for rows of up to `vocabulary` logits, which then allocates nothing more.
    ///
    /// # Panics
    /// If this processor does not run `set`.
    pub fn new(set: SetKind, vocabulary: usize) -> Self {
        let set = Set::new(set).unwrap_or_else(|| panic!("no {} here", set.as_str()));
        let keys = Vec::with_capacity(vocabulary);
        Self { set, weights: vec![0; vocabulary], keys, adjuster: Adjuster::default() }
    }

    /// As [`Sampler::sample`], with the logits adjusted first: bias, then penalties over the text
    /// so far, then temperature and filters, the order of vLLM and llama.cpp.
    pub fn sample_adjusted(
        &mut self,
        logits: &[f32],
        (adjustment, past): (&Adjustment, Past<'_>),
        sampling: &Sampling,
        position: u32,
    ) -> TokenId {
        let mut adjuster = std::mem::take(&mut self.adjuster);
        let token = self.sample(adjuster.apply(logits, adjustment, past), sampling, position);
        self.adjuster = adjuster;
        token
    }

    /// Log-probabilities of `token` and of the `top` most likely tokens, by the logits as they
    /// are. Impossible ones are -9999.
    pub fn logprobs(&self, logits: &[f32], token: TokenId, top: u8) -> Logprobs {
        logprobs::logprobs(self.set, logits, token, top)
    }

    /// The token at `position` of a sequence.
    ///
    /// At temperature 0 the most likely one, the lowest id of equals. Else logits are divided by
    /// the temperature, then top-k, top-p and min-p leave out tokens in this order (of equally
    /// likely tokens the higher id goes first), and one of the rest is drawn. NaN counts as minus
    /// infinity; plus infinity is always chosen; without any number above minus infinity it is
    /// token 0.
    pub fn sample(&mut self, logits: &[f32], sampling: &Sampling, position: u32) -> TokenId {
        let greedy = sampling.is_greedy();
        self.weights.resize(logits.len(), 0);
        self.keys.clear();
        self.keys.reserve(logits.len());
        let temperature = (!greedy).then_some(sampling.temperature);
        let result = Mutex::new((self.weights.as_mut_slice(), f32::NEG_INFINITY));
        let weigh = Weigh { logits, temperature, result };
        self.set.run(&weigh, 0..1);
        let (_, peak) = weigh.result.into_inner().unwrap_or_else(PoisonError::into_inner);
        if greedy || peak.is_infinite() {
            return first(logits, peak).unwrap_or(0) as TokenId;
        }
        let floor = self.floor(sampling);
        let product = u128::from(draw(sampling, position)) * u128::from(self.mass(floor));
        self.at((product >> 64) as u64, floor)
    }

    /// The least key that the filters keep.
    fn floor(&mut self, sampling: &Sampling) -> Key {
        let mut floor = least_key(1);
        let top_k = sampling.top_k as usize;
        if top_k > 0 && top_k < self.weights.len() {
            floor = floor.max(self.nth_key(top_k));
        }
        if sampling.top_p < 1.0 {
            floor = floor.max(self.nucleus(floor, sampling.top_p));
        }
        if sampling.min_p > 0.0 {
            // Exact: both factors have 24 significant bits at most.
            let least = (f64::from(sampling.min_p) * f64::from(ONE)).ceil() as u32;
            floor = floor.max(least_key(least.min(ONE)));
        }
        floor
    }

    /// The `count`-th largest key.
    fn nth_key(&mut self, count: usize) -> Key {
        let enough = |least: &u32| self.census(0..self.weights.len(), *least).count >= count;
        let least = falling().find(enough).unwrap_or(1);
        self.collect(least_key(least));
        let Some(index) = self.keys.len().checked_sub(count) else { return least_key(1) };
        *self.keys.select_nth_unstable(index).1
    }

    /// The least key of the smallest set of largest keys that holds `share` of the weight of all
    /// keys from `floor` on.
    fn nucleus(&mut self, floor: Key, share: f32) -> Key {
        let total = self.mass(floor);
        // A product of two f64, rounded once: the same on every machine.
        let share = f64::from(share.max(0.0)) * total as f64;
        let mut need = (share.ceil() as u64).clamp(1, total);
        let enough = |least: &u32| self.mass(floor.max(least_key(*least))) >= need;
        let least = falling().find(enough).unwrap_or(1);
        self.collect(floor.max(least_key(least)));
        // Halves the candidates until the one is left that fills the share.
        let mut keys = self.keys.as_mut_slice();
        loop {
            let middle = keys.len() / 2;
            let (larger, pivot, smaller) = keys.select_nth_unstable_by(middle, |a, b| b.cmp(a));
            let above: u64 = larger.iter().map(|key| weight_of(*key)).sum();
            if above >= need {
                keys = larger;
            } else if above + weight_of(*pivot) >= need || smaller.is_empty() {
                return *pivot;
            } else {
                need -= above + weight_of(*pivot);
                keys = smaller;
            }
        }
    }

    /// Makes candidates of all keys from `floor` on.
    fn collect(&mut self, floor: Key) {
        self.keys.clear();
        for (least, ids) in self.parts(floor) {
            for block in blocks(ids) {
                if self.census(block.clone(), least).count > 0 {
                    let keys = block.map(|id| key(id, self.weights[id]));
                    self.keys.extend(keys.filter(|key| *key >= floor));
                }
            }
        }
    }

    /// Weight of all keys from `floor` on.
    fn mass(&self, floor: Key) -> u64 {
        self.parts(floor).into_iter().map(|(least, ids)| self.census(ids, least).mass).sum()
    }

    /// The token that `rest` falls on, where all kept weights lie side by side by id.
    fn at(&self, mut rest: u64, floor: Key) -> TokenId {
        for (least, ids) in self.parts(floor) {
            for block in blocks(ids) {
                let mass = self.census(block.clone(), least).mass;
                if rest >= mass {
                    rest -= mass;
                    continue;
                }
                for id in block.filter(|id| self.weights[*id] >= least) {
                    match rest.checked_sub(u64::from(self.weights[id])) {
                        Some(less) => rest = less,
                        None => return id as TokenId,
                    }
                }
            }
        }
        unreachable!("the draw is below the sum of all weights")
    }

    /// What is kept from `floor` on, as two ranges of ids and the least weight in each: of equal
    /// weights only lower ids are kept.
    fn parts(&self, floor: Key) -> [(u32, Range<usize>); 2] {
        let (weight, last) = (weight_of(floor) as u32, !(floor as u32));
        let end = self.weights.len();
        let cut = end.min((last as usize).saturating_add(1));
        [(weight, 0..cut), (weight + 1, cut..end)]
    }

    /// Sum and number of weights from `least` on.
    fn census(&self, ids: Range<usize>, least: u32) -> Census {
        let task = Count { weights: &self.weights[ids], least, result: Mutex::default() };
        self.set.run(&task, 0..1);
        task.result.into_inner().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Pieces of a range that are looked at closely if a census says so.
fn blocks(ids: Range<usize>) -> impl Iterator<Item = Range<usize>> {
    const BLOCK: usize = 512;
    ids.clone().step_by(BLOCK).map(move |start| start..ids.end.min(start + BLOCK))
}

/// Orders tokens by weight, of equal ones the lower id first: the weight, then the id's complement.
type Key = u64;

fn key(id: usize, weight: u32) -> Key {
    u64::from(weight) << 32 | u64::from(!(id as u32))
}

/// Below every key of this weight, above every key of less.
fn least_key(weight: u32) -> Key {
    u64::from(weight) << 32
}

fn weight_of(key: Key) -> u64 {
    key >> 32
}

/// Weights to cut candidates at, so that a filter looks closely at few of them.
fn falling() -> impl Iterator<Item = u32> {
    (0..=30).step_by(3).map(|shift| ONE >> shift)
}

/// Finds the largest logit and, given a temperature, makes weights of all.
struct Weigh<'a> {
    logits: &'a [f32],
    temperature: Option<f32>,
    result: Mutex<(&'a mut [u32], f32)>,
}

impl Task for Weigh<'_> {
    fn units(&self) -> usize {
        1
    }

    #[inline(always)]
    fn run<S: Isa>(&self, s: S, _: Range<usize>) {
        let mut result = self.result.lock().unwrap_or_else(PoisonError::into_inner);
        let (whole, rest) = self.logits.as_chunks::<LANES>();
        let mut last = [f32::NEG_INFINITY; LANES];
        last[..rest.len()].copy_from_slice(rest);
        let mut peak = s.load(&last);
        // The second operand wins over NaN.
        peak = s.max(peak, s.splat(f32::NEG_INFINITY));
        for lanes in whole {
            peak = s.max(s.load(lanes), peak);
        }
        let peak = s.peak(peak);
        result.1 = peak;
        let Some(temperature) = self.temperature else { return };
        if peak.is_infinite() {
            return;
        }
        let (top, temperature) = (s.splat(peak), s.splat(temperature));
        let (out, out_rest) = result.0.as_chunks_mut::<LANES>();
        for (logits, out) in whole.iter().zip(out) {
            *out = fixed(s, s.div(s.sub(s.load(logits), top), temperature));
        }
        let fixed = fixed(s, s.div(s.sub(s.load(&last), top), temperature));
        out_rest.copy_from_slice(&fixed[..out_rest.len()]);
    }
}

/// Where `peak` is first.
fn first(logits: &[f32], peak: f32) -> Option<usize> {
    // Without a way out in the middle, a chunk is compared as one vector.
    let holds = |chunk: &[f32]| chunk.iter().fold(false, |found, logit| found | (*logit == peak));
    let chunk = logits.chunks(LANES).position(holds)? * LANES;
    logits[chunk..].iter().position(|logit| *logit == peak).map(|at| chunk + at)
}

/// Counts the weights from `least` on.
struct Count<'a> {
    weights: &'a [u32],
    least: u32,
    result: Mutex<Census>,
}

#[derive(Default)]
struct Census {
    mass: u64,
    count: usize,
}

impl Task for Count<'_> {
    fn units(&self) -> usize {
        1
    }

    #[inline(always)]
    fn run<S: Isa>(&self, _: S, _: Range<usize>) {
        let mut census = Census::default();
        for weights in self.weights.chunks(CENSUS) {
            // Whole numbers have one sum in any order, so this is left to the compiler to turn
            // into vectors. It does where all lanes are 32 bits wide: halves are added apart.
            let mut sums = [[0; LANES]; 3];
            let (whole, rest) = weights.as_chunks::<LANES>();
            for lanes in whole {
                add(&mut sums, lanes, self.least);
            }
            let mut last = [0; LANES];
            last[..rest.len()].copy_from_slice(rest);
            add(&mut sums, &last, self.least);
            let [low, high, count] =
                sums.map(|lanes| lanes.into_iter().map(u64::from).sum::<u64>());
            census.mass += low + (high << 16);
            census.count += count as usize;
        }
        *self.result.lock().unwrap_or_else(PoisonError::into_inner) = census;
    }
}

/// Adds low halves, high halves and the number of the weights from `least` (at least 1) on.
#[inline(always)]
fn add([low, high, count]: &mut [[u32; LANES]; 3], weights: &[u32; LANES], least: u32) {
    for i in 0..LANES {
        let kept = if weights[i] >= least { weights[i] } else { 0 };
        low[i] += kept & 0xFFFF;
        high[i] += kept >> 16;
        count[i] += u32::from(kept > 0);
    }
}

/// Weights whose halves can be added in 16 lanes of 32 bits.
const CENSUS: usize = 1 << 19;

/// `e^x × 2^30`, rounded down; 0 for NaN, 2^30 where `x` is above 0.
#[inline(always)]
fn fixed<S: Isa>(s: S, x: S::F) -> [u32; LANES] {
    let nothing = s.splat(-100.0);
    let x = s.where_less(nothing, x, x, nothing);
    let x = s.where_less(x, s.splat(0.0), x, s.splat(0.0));
    let weights = s.store(s.mul(math::exp(s, x), s.splat(ONE as f32)));
    let mut fixed = [0; LANES];
    for (fixed, weight) in fixed.iter_mut().zip(weights) {
        // SAFETY: `exp` of at most 0 is at most 1, and never NaN since its argument is not.
        *fixed = unsafe { weight.to_int_unchecked::<i32>() } as u32;
    }
    fixed
}

/// 64 random bits for a position of a choice.
fn draw(sampling: &Sampling, position: u32) -> u64 {
    let key = [sampling.seed as u32, (sampling.seed >> 32) as u32];
    let [low, high, ..] = philox([position, sampling.choice, 0, 0], key);
    u64::from(high) << 32 | u64::from(low)
}

/// Philox-4x32-10: a counter-based generator (Salmon and others, "Parallel random numbers: as easy
/// as 1, 2, 3", 2011).
fn philox(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..10 {
        let a = u64::from(counter[0]) * 0xD251_1F53;
        let b = u64::from(counter[2]) * 0xCD9E_8D57;
        counter = [
            (b >> 32) as u32 ^ counter[1] ^ key[0],
            b as u32,
            (a >> 32) as u32 ^ counter[3] ^ key[1],
            a as u32,
        ];
        key = [key[0].wrapping_add(0x9E37_79B9), key[1].wrapping_add(0xBB67_AE85)];
    }
    counter
}

#[cfg(test)]
mod tests;
