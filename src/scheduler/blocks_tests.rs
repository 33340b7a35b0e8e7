//! Tests of one lane's block accounting.

use super::*;

impl Blocks {
    /// Panics if the counts, lists and the index do not agree with `holders`.
    pub(in crate::scheduler) fn check(&self, holders: &HashMap<BlockId, u32>) {
        let (mut free, mut held, mut cached, mut registered) = (0, 0, 0, 0);
        for (number, group) in self.groups.iter().enumerate() {
            let lent = !group.pages.is_empty();
            let (mut held_here, mut cached_here) = (0, 0);
            for slot in 0..self.per_group {
                let id = BlockId { group: number as u32, slot };
                let block = &self.blocks[self.flat(id) as usize];
                assert_eq!(block.holders, holders.get(&id).copied().unwrap_or(0), "{id:?}");
                let is_free = group.free.contains(&slot);
                let full = |entry: &Entry| entry.filled == BLOCK_TOKENS;
                registered += usize::from(block.entry.as_ref().is_some_and(full));
                held_here += u32::from(block.holders > 0);
                cached_here += u32::from(block.holders == 0 && block.entry.is_some());
                let unused = block.holders == 0 && block.entry.is_none();
                assert_eq!(is_free, lent && unused, "{id:?} is free or in use");
            }
            assert_eq!((group.held, group.cached), (held_here, cached_here));
            held += held_here;
            cached += cached_here;
            free += if group.leaving { 0 } else { group.free.len() as u32 };
        }
        assert_eq!((self.free, self.held, self.cached), (free, held, cached));
        assert_eq!(self.index.len(), registered);
        for block in self.beginnings.values() {
            assert!(self.blocks[*block as usize].entry.is_some(), "{block} is registered");
        }
        let uses: Vec<GroupUse> = self.groups.iter().map(Group::used).collect();
        let count = |matches: fn(&GroupUse) -> bool| {
            uses.iter().filter(|used| matches(used)).count() as u32
        };
        assert_eq!(self.empty_groups, count(|used| *used == GroupUse::Empty));
        assert_eq!(self.cached_groups, count(|used| matches!(used, GroupUse::CachedOnly(_))));
        let mut listed = 0;
        let mut at = self.oldest;
        while at != NONE {
            listed += 1;
            at = self.blocks[at as usize].newer;
        }
        assert_eq!(listed, cached, "cached blocks are listed");
    }
}

fn two_groups() -> Blocks {
    let mut blocks = Blocks::new(2);
    assert_eq!((blocks.add_group(vec![7]), blocks.add_group(vec![8])), (0, 1));
    blocks
}

#[test]
fn a_leaving_group_gives_its_pages_with_its_last_block() {
    let mut blocks = two_groups();
    let held = blocks.take().unwrap();
    assert_eq!(blocks.leave(held.group), None);
    assert_eq!((blocks.free(), blocks.held()), (2, 1));
    let elsewhere = blocks.take().unwrap();
    assert_ne!(elsewhere.group, held.group, "nothing new goes to a leaving group");
    let made = blocks.register(held, Prefix::empty(TenantId(0)), [1; BLOCK_TOKENS]);
    assert_ne!(made, Prefix::empty(TenantId(0)));
    let pages = blocks.release(held);
    assert_eq!(pages, Some(vec![7]), "it does not stay as cache");
    assert_eq!(blocks.add_group(vec![9]), held.group, "the number is used again");
}

#[test]
fn leaving_drops_what_is_cached() {
    let mut blocks = two_groups();
    let root = Prefix::empty(TenantId(0));
    let block = blocks.take().unwrap();
    blocks.register(block, root, [1; BLOCK_TOKENS]);
    assert_eq!(blocks.release(block), None);
    assert_eq!((blocks.cached(), blocks.group_use(0)), (1, GroupUse::CachedOnly(1)));
    assert_eq!(blocks.leave(0), Some(vec![7]));
    assert_eq!(blocks.reuse(root, &[1; BLOCK_TOKENS]), None);
    blocks.check(&HashMap::new());
}

#[test]
fn the_latest_block_that_begins_alike_is_found_by_its_beginning() {
    let mut blocks = two_groups();
    let root = Prefix::empty(TenantId(0));
    let text = |from: usize, token| {
        let mut text = [1; BLOCK_TOKENS];
        text[from..].fill(token);
        text
    };
    let [older, newer] = [(20, 2), (12, 3)].map(|(from, token)| {
        let block = blocks.take().unwrap();
        blocks.register(block, root, text(from, token));
        block
    });
    assert_eq!(blocks.reuse_part(root, &text(31, 9)[..31]), Some((older, 20)));
    assert_eq!(blocks.reuse_part(root, &text(14, 9)[..31]), Some((newer, 12)));
    assert_eq!(blocks.reuse_part(root, &text(31, 9)[..15]), Some((newer, 12)));
    assert_eq!(blocks.reuse_part(root, &text(31, 9)[..7]), None);
    assert_eq!(blocks.reuse_part(Prefix::empty(TenantId(1)), &text(31, 9)[..31]), None);
    (0..3).for_each(|_| _ = blocks.release(newer));
    // Evicted, it takes what both began with along: the other is still found by more.
    assert_eq!(blocks.cached(), 1);
    (0..3).for_each(|_| _ = blocks.take());
    assert_eq!(blocks.reuse_part(root, &text(14, 9)[..14]), None);
    assert_eq!(blocks.reuse_part(root, &text(31, 9)[..31]), Some((older, 20)));
}

#[test]
fn an_equal_hash_of_other_tokens_is_a_miss() {
    let mut blocks = two_groups();
    let root = Prefix::empty(TenantId(0));
    let block = blocks.take().unwrap();
    blocks.register(block, root, [1; BLOCK_TOKENS]);
    // As if the tokens of 2 had the hash of 1's.
    let wrong = blocks.flat(block);
    blocks.index.insert(hash_of(root, &[2; BLOCK_TOKENS]), wrong);
    assert_eq!(blocks.reuse(root, &[2; BLOCK_TOKENS]), None);
    let tenant = Prefix::empty(TenantId(1));
    blocks.index.insert(hash_of(tenant, &[1; BLOCK_TOKENS]), wrong);
    assert_eq!(blocks.reuse(tenant, &[1; BLOCK_TOKENS]), None);
    blocks.beginnings.insert(hash_of(tenant, &[1; 8]), wrong);
    blocks.beginnings.insert(hash_of(root, &[2; 8]), wrong);
    assert_eq!(blocks.reuse_part(tenant, &[1; 8]), None);
    assert_eq!(blocks.reuse_part(root, &[2; 8]), None);
}

#[test]
fn a_block_that_is_not_filled_can_be_copied_only() {
    let mut blocks = two_groups();
    let root = Prefix::empty(TenantId(0));
    let text = [1; BLOCK_TOKENS];
    let [long, short, shorter] = [20, 12, 7].map(|length| {
        let block = blocks.take().unwrap();
        blocks.register_part(block, root, &text[..length]);
        block
    });
    assert_eq!(blocks.reuse(root, &text), None);
    assert_eq!(blocks.reuse_part(root, &text[..31]), Some((long, 20)), "no more than it has");
    (0..2).for_each(|_| _ = blocks.release(long));
    blocks.release(short);
    blocks.release(shorter);
    assert_eq!(blocks.cached(), 1, "the others have nothing that the first has not");
    // Its room is needed: nothing is left of it.
    (0..4).for_each(|_| _ = blocks.take());
    assert_eq!(blocks.reuse_part(root, &text[..31]), None);
}
