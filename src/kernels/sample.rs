//! Stand-in until sampling is merged.

use crate::request::Sampling;

/// Stand-in.
#[derive(Debug, Default)]
pub struct Sampler {}

impl Sampler {
    /// Greedy.
    pub fn sample(&mut self, logits: &[f32], _sampling: &Sampling, _position: u32) -> u32 {
        let best = logits.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1));
        best.map_or(0, |(index, _)| index as u32)
    }
}
