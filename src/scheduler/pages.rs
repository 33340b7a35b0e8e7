//! Lends super-pages to lanes, in groups of one page a layer, and keeps every lane's guarantee.
//! Pure accounting on the host; knows nothing of sequences, and never what a page contains.

use super::blocks::{BlockTokens, Blocks, GroupUse, Prefix};
use super::step::{BlockId, Grant};
use crate::request::TokenId;

/// The pool of super-pages and every lane's blocks.
///
/// A lane can always come to its guaranteed groups. Other lanes may borrow them only while the
/// lane has no work: as long as it has some, what it lacks of its guarantee is held back from
/// those above theirs, and what it lacks is taken back from those above theirs. Then either pages
/// are free, or some lane is above its guarantee, because guarantees never add up to more than
/// the pool.
#[derive(Debug)]
pub(super) struct Pages {
    free: Vec<u32>,
    total: u32,
    lanes: Vec<Loan>,
    /// Counts what may have made room for some lane.
    releases: u64,
}

#[derive(Debug)]
struct Loan {
    blocks: Blocks,
    /// Pages in a group; 0 for a lane that needs none.
    layers: u32,
    per_group: u32,
    guaranteed: u32,
    /// Groups lent and not leaving.
    lent: u32,
    /// Groups that are on their way back.
    leaving: u32,
    /// Whether the lane has work.
    active: bool,
    /// Groups that the lane's next step announces.
    fresh: Vec<u32>,
}

/// What a lane needs of the pool.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Needs {
    /// Pages in a group; 0 for none.
    pub(super) layers: u32,
    /// Blocks in a group.
    pub(super) per_group: u32,
    /// Groups that no other lane can keep.
    pub(super) guaranteed: u32,
}

impl Pages {
    /// `total` free super-pages.
    pub(super) fn new(total: u32, needs: impl Iterator<Item = Needs>) -> Self {
        let lanes: Vec<Loan> = needs.map(Loan::new).collect();
        let guaranteed: u64 =
            lanes.iter().map(|loan| u64::from(loan.guaranteed) * u64::from(loan.layers)).sum();
        assert!(
            guaranteed <= u64::from(total),
            "the lanes' guarantees ({guaranteed} pages) exceed the pool ({total} pages)"
        );
        Self { free: (0..total).rev().collect(), total, lanes, releases: 0 }
    }

    /// One lane's blocks.
    pub(super) fn blocks(&self, lane: usize) -> &Blocks {
        &self.lanes[lane].blocks
    }

    /// Super-pages that are lent.
    pub(super) fn lent(&self) -> u32 {
        self.total - self.free.len() as u32
    }

    /// Share of the pool that sequences hold, counted in blocks.
    pub(super) fn usage(&self) -> f64 {
        let held = |loan: &Loan| {
            f64::from(loan.blocks.held()) * f64::from(loan.layers) / f64::from(loan.per_group)
        };
        let pages: f64 = self.lanes.iter().filter(|loan| loan.layers > 0).map(held).sum();
        pages / f64::from(self.total.max(1))
    }

    /// Says whether the lane has work; its guarantee is held back only then.
    pub(super) fn set_active(&mut self, lane: usize, active: bool) {
        let was = std::mem::replace(&mut self.lanes[lane].active, active);
        self.releases += u64::from(was && !active);
    }

    /// Grows whenever something was released; as long as it does not, what lacked room still does.
    pub(super) fn releases(&self) -> u64 {
        self.releases
    }

    /// Whether the lane has fewer groups than it is guaranteed.
    pub(super) fn is_below_guarantee(&self, lane: usize) -> bool {
        self.lanes[lane].lent < self.lanes[lane].guaranteed
    }

    /// A block for one sequence of the lane, from its own groups, its cache or the pool.
    pub(super) fn take(&mut self, lane: usize) -> Option<BlockId> {
        self.make_room(lane, 1).then(|| self.lanes[lane].blocks.take()).flatten()
    }

    /// See [`Blocks::reuse`].
    pub(super) fn reuse(
        &mut self,
        lane: usize,
        prefix: Prefix,
        tokens: &BlockTokens,
    ) -> Option<(BlockId, Prefix)> {
        self.lanes[lane].blocks.reuse(prefix, tokens)
    }

    /// See [`Blocks::reuse_part`].
    pub(super) fn reuse_part(
        &mut self,
        lane: usize,
        prefix: Prefix,
        tokens: &[TokenId],
    ) -> Option<(BlockId, u32)> {
        self.lanes[lane].blocks.reuse_part(prefix, tokens)
    }

    /// See [`Blocks::register`].
    pub(super) fn register(
        &mut self,
        lane: usize,
        id: BlockId,
        prefix: Prefix,
        tokens: BlockTokens,
    ) -> Prefix {
        self.lanes[lane].blocks.register(id, prefix, tokens)
    }

    /// See [`Blocks::register_part`].
    pub(super) fn register_part(
        &mut self,
        lane: usize,
        id: BlockId,
        prefix: Prefix,
        tokens: &[TokenId],
    ) {
        self.lanes[lane].blocks.register_part(id, prefix, tokens);
    }

    /// A sequence of the lane gives a block back.
    pub(super) fn release(&mut self, lane: usize, id: BlockId) {
        self.releases += 1;
        let loan = &mut self.lanes[lane];
        if let Some(pages) = loan.blocks.release(id) {
            loan.leaving -= 1;
            self.free.extend(pages);
        }
    }

    /// Tries to make `blocks` blocks available to the lane without touching any sequence, and
    /// says whether they are. Unused memory goes first, the lane's own cache second (it is
    /// evicted only when the blocks are taken), caches of lanes above their guarantee last.
    pub(super) fn make_room(&mut self, lane: usize, blocks: u32) -> bool {
        if self.lanes[lane].layers == 0 {
            return blocks == 0;
        }
        let free = self.lanes[lane].blocks.free();
        if free >= blocks {
            return true;
        }
        let per_group = self.lanes[lane].per_group;
        let wanted = (blocks - free).div_ceil(per_group);
        for _ in 0..wanted.min(self.obtainable(lane, false)) {
            self.lend(lane);
        }
        let own = &self.lanes[lane].blocks;
        let have = own.free() + own.cached();
        if have >= blocks {
            return true;
        }
        let wanted = (blocks - have).div_ceil(per_group);
        if self.obtainable(lane, true) < wanted {
            return false;
        }
        for _ in 0..wanted {
            self.lend(lane);
        }
        true
    }

    /// Pages that must still come free before the lane can have `blocks` blocks, as far as its
    /// guarantee covers them, beyond what is free, unused or on its way back already.
    pub(super) fn lacking(&self, lane: usize, blocks: u32) -> u32 {
        let loan = &self.lanes[lane];
        if loan.layers == 0 || loan.lent >= loan.guaranteed {
            return 0;
        }
        let short = blocks.saturating_sub(loan.blocks.free() + loan.blocks.cached());
        let groups = short.div_ceil(loan.per_group).min(loan.guaranteed - loan.lent);
        let leaving: u32 = self.lanes.iter().map(|other| other.leaving * other.layers).sum();
        (groups * loan.layers).saturating_sub(self.reachable(lane, true) + leaving)
    }

    /// Of the other lanes, the one furthest above its guarantee that has a group in use.
    pub(super) fn most_above_guarantee(&self, lane: usize) -> Option<usize> {
        let candidates = (0..self.lanes.len()).filter(|&other| {
            let loan = &self.lanes[other];
            other != lane && loan.above() > 0 && loan.has_held_group()
        });
        candidates.max_by_key(|&other| self.lanes[other].above() * self.lanes[other].layers)
    }

    /// Takes a group away from its lane: at once if nobody holds a block of it, else as soon as
    /// its last block is released.
    pub(super) fn take_away(&mut self, lane: usize, group: u32) {
        self.releases += 1;
        let loan = &mut self.lanes[lane];
        loan.lent -= 1;
        match loan.blocks.leave(group) {
            Some(pages) => self.free.extend(pages),
            None => loan.leaving += 1,
        }
    }

    /// Announces a group again: the step that carried its grant failed.
    pub(super) fn grant_again(&mut self, lane: usize, group: u32) {
        let fresh = &mut self.lanes[lane].fresh;
        if !fresh.contains(&group) {
            fresh.push(group);
        }
    }

    /// Appends the grants that the lane's next step announces.
    pub(super) fn announce(&mut self, lane: usize, grants: &mut Vec<Grant>) {
        let loan = &mut self.lanes[lane];
        for group in loan.fresh.drain(..) {
            let pages = loan.blocks.pages_of(group);
            if !pages.is_empty() {
                grants.push(Grant { group, pages: pages.to_vec() });
            }
        }
    }

    /// Groups that the lane could get now without touching any sequence; with other lanes'
    /// cached blocks or only with what nobody uses.
    fn obtainable(&self, lane: usize, with_cached: bool) -> u32 {
        let loan = &self.lanes[lane];
        let pages = self.reachable(lane, with_cached);
        let guaranteed = loan.guaranteed.saturating_sub(loan.lent);
        let unreserved = pages.saturating_sub(self.reserved(lane));
        (pages / loan.layers).min(guaranteed).max(unreserved / loan.layers)
    }

    /// Free pages, and those of other lanes that go without touching any sequence.
    fn reachable(&self, lane: usize, with_cached: bool) -> u32 {
        let others = self.lanes.iter().enumerate().filter(|&(other, _)| other != lane);
        let spare: u32 = others.map(|(_, loan)| loan.spare(with_cached) * loan.layers).sum();
        self.free.len() as u32 + spare
    }

    /// Pages that other lanes with work lack of their guarantees.
    fn reserved(&self, lane: usize) -> u32 {
        let others = self.lanes.iter().enumerate().filter(|&(other, _)| other != lane);
        let lacking = |loan: &Loan| loan.guaranteed.saturating_sub(loan.lent) * loan.layers;
        others.filter(|(_, loan)| loan.active).map(|(_, loan)| lacking(loan)).sum()
    }

    /// Lends one group, which must be obtainable.
    fn lend(&mut self, lane: usize) {
        while self.free.len() < self.lanes[lane].layers as usize {
            self.take_spare(lane);
        }
        let loan = &mut self.lanes[lane];
        let pages = self.free.split_off(self.free.len() - loan.layers as usize);
        let group = loan.blocks.add_group(pages);
        loan.lent += 1;
        loan.fresh.push(group);
    }

    /// Takes one spare group from another lane: an empty one, else the one with the fewest
    /// cached blocks of the lane furthest above its guarantee.
    fn take_spare(&mut self, lane: usize) {
        let others = || (0..self.lanes.len()).filter(|&other| other != lane);
        let victim = others()
            .find(|&other| self.lanes[other].spare(false) > 0)
            .or_else(|| {
                let above = |other: usize| self.lanes[other].above() * self.lanes[other].layers;
                others()
                    .filter(|&other| self.lanes[other].spare(true) > 0)
                    .max_by_key(|&other| above(other))
            })
            .expect("an obtainable group is free or spare");
        let blocks = &self.lanes[victim].blocks;
        let unused = |group: &u32| match blocks.group_use(*group) {
            GroupUse::Empty => Some(0),
            GroupUse::CachedOnly(cached) => Some(cached),
            GroupUse::Held | GroupUse::Gone => None,
        };
        let group =
            blocks.group_numbers().filter(|group| unused(group).is_some()).min_by_key(unused);
        self.take_away(victim, group.expect("a spare group is empty or cached"));
    }
}

impl Loan {
    fn new(needs: Needs) -> Self {
        assert!(needs.layers == 0 || needs.per_group > 0, "a group holds at least one block");
        Self {
            blocks: Blocks::new(needs.per_group),
            layers: needs.layers,
            per_group: needs.per_group,
            guaranteed: needs.guaranteed,
            lent: 0,
            leaving: 0,
            active: false,
            fresh: Vec::new(),
        }
    }

    /// Groups above the guarantee.
    fn above(&self) -> u32 {
        self.lent.saturating_sub(self.guaranteed)
    }

    /// Groups that other lanes may take without touching any sequence: what is unused above the
    /// guarantee, all that is empty while the lane has no work, and cached ones on demand.
    fn spare(&self, with_cached: bool) -> u32 {
        let empty = self.blocks.empty_groups();
        let unused = if self.active { empty.min(self.above()) } else { empty };
        if !with_cached {
            return unused;
        }
        unused + self.blocks.cached_groups().min(self.above().saturating_sub(unused))
    }

    /// Whether sequences hold blocks of some group that stays.
    fn has_held_group(&self) -> bool {
        self.lent > self.blocks.empty_groups() + self.blocks.cached_groups()
    }
}

#[cfg(test)]
impl Pages {
    /// Panics if a page is not in exactly one place.
    pub(super) fn check(&self) {
        let mut seen = vec![0u32; self.total as usize];
        self.free.iter().for_each(|&page| seen[page as usize] += 1);
        for loan in &self.lanes {
            let (mut lent, mut leaving) = (0, 0);
            for group in loan.blocks.group_numbers() {
                let pages = loan.blocks.pages_of(group);
                assert!(pages.is_empty() || pages.len() == loan.layers as usize);
                pages.iter().for_each(|&page| seen[page as usize] += 1);
                let gone = loan.blocks.group_use(group) == GroupUse::Gone;
                lent += u32::from(!gone);
                leaving += u32::from(gone && !pages.is_empty());
            }
            assert_eq!((loan.lent, loan.leaving), (lent, leaving));
        }
        assert!(seen.iter().all(|&places| places == 1), "{seen:?}");
    }

    /// Groups lent and guaranteed, and whether the lane has work.
    pub(super) fn loan(&self, lane: usize) -> (u32, u32, bool) {
        let loan = &self.lanes[lane];
        (loan.lent, loan.guaranteed, loan.active)
    }
}
