//! A tiny seeded generator (splitmix64) and the mixing function it is made of.

/// Random numbers that depend on the seed alone.
#[derive(Debug, Clone)]
pub(in crate::scheduler) struct Rng(pub(in crate::scheduler) u64);

impl Rng {
    pub(in crate::scheduler) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    /// A number in `range`, both ends included.
    pub(in crate::scheduler) fn within(&mut self, low: u64, high: u64) -> u64 {
        low + self.next() % (high - low + 1)
    }

    /// True once in `n` times.
    pub(in crate::scheduler) fn once_in(&mut self, n: u64) -> bool {
        self.next().is_multiple_of(n)
    }
}

/// A bijection of 64 bits that looks random.
pub(in crate::scheduler) fn mix(value: u64) -> u64 {
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}
