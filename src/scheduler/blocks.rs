//! One lane's KV blocks: who holds them, and which full ones can be reused as a prefix. Knows
//! page groups only as lent; `pages.rs` lends them. Never knows what a block contains.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};

use super::step::{BLOCK_TOKENS, BlockId};
use crate::request::{TenantId, TokenId};

/// Ends a list.
const NONE: u32 = u32::MAX;

/// How many of their first tokens blocks are looked for by, where only the beginning is wanted.
const BEGINNINGS: [usize; 3] = [8, 16, 24];

/// The tokens of one full block.
pub(super) type BlockTokens = [TokenId; BLOCK_TOKENS];

/// Names the prefix that a block continues: a tenant's empty one, or a registered block. Serials
/// are never reused, so a chain of them stands for the whole prefix, tenant included.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Prefix(u64);

impl Prefix {
    /// The empty prefix of a tenant: prefixes of two tenants never meet.
    pub(super) fn empty(tenant: TenantId) -> Self {
        Self(u64::from(tenant.0))
    }
}

/// The blocks of one lane's groups.
///
/// A block is free, held by one or more sequences, or cached: held by none, but registered and so
/// reusable until its room is needed (least recently used goes first). A full one is used as it
/// is; of others, and where a text goes on differently, the beginning can be copied.
#[derive(Debug)]
pub(super) struct Blocks {
    /// Blocks in a group.
    per_group: u32,
    groups: Vec<Group>,
    /// Group numbers not in use.
    vacant: Vec<u32>,
    /// `group × per_group + slot`.
    blocks: Vec<Block>,
    /// Tokens of registered blocks, same index; as many as are filled.
    tokens: Vec<BlockTokens>,
    /// Hash of (prefix, tokens) to a full registered block; it is compared before it is used.
    index: HashMap<u64, u32>,
    /// Hash of (prefix, first tokens) to the latest registered block that begins so, for each of
    /// `BEGINNINGS`; compared likewise.
    beginnings: HashMap<u64, u32>,
    next_serial: u64,
    /// Ends of the list of cached blocks.
    oldest: u32,
    newest: u32,
    /// Where the last new block went: taken from until full.
    current: u32,
    free: u32,
    held: u32,
    cached: u32,
    /// Groups without a block in use, and groups with only cached ones.
    empty_groups: u32,
    cached_groups: u32,
}

#[derive(Debug, Default)]
struct Group {
    /// Its super-pages; empty for a number not in use.
    pages: Vec<u32>,
    /// Free slots.
    free: Vec<u32>,
    held: u32,
    cached: u32,
    /// Goes back to the pool as soon as nobody holds a block of it.
    leaving: bool,
}

#[derive(Debug, Clone)]
struct Block {
    /// Sequences that hold it.
    holders: u32,
    older: u32,
    newer: u32,
    /// Set while registered.
    entry: Option<Entry>,
}

#[derive(Debug, Clone, Copy)]
struct Entry {
    prefix: Prefix,
    /// Tokens that it has.
    filled: usize,
    /// Of a full block.
    hash: u64,
    serial: u64,
}

/// What a group is used for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum GroupUse {
    /// No block of it is in use.
    Empty,
    /// Only cached blocks: this many.
    CachedOnly(u32),
    /// Sequences hold blocks of it.
    Held,
    /// On its way back to the pool, or not lent.
    Gone,
}

impl Blocks {
    /// A lane without groups.
    pub(super) fn new(per_group: u32) -> Self {
        Self {
            per_group,
            groups: Vec::new(),
            vacant: Vec::new(),
            blocks: Vec::new(),
            tokens: Vec::new(),
            index: HashMap::new(),
            beginnings: HashMap::new(),
            next_serial: 1 << 32,
            oldest: NONE,
            newest: NONE,
            current: NONE,
            free: 0,
            held: 0,
            cached: 0,
            empty_groups: 0,
            cached_groups: 0,
        }
    }

    /// Free blocks in groups that stay.
    pub(super) fn free(&self) -> u32 {
        self.free
    }

    /// Blocks that sequences hold.
    pub(super) fn held(&self) -> u32 {
        self.held
    }

    /// Blocks that only the prefix cache holds.
    pub(super) fn cached(&self) -> u32 {
        self.cached
    }

    /// Groups without a block in use.
    pub(super) fn empty_groups(&self) -> u32 {
        self.empty_groups
    }

    /// Groups of which only cached blocks are in use.
    pub(super) fn cached_groups(&self) -> u32 {
        self.cached_groups
    }

    /// Takes in a group of super-pages and numbers it.
    pub(super) fn add_group(&mut self, pages: Vec<u32>) -> u32 {
        let number = self.vacant.pop().unwrap_or(self.groups.len() as u32);
        if number as usize == self.groups.len() {
            self.groups.push(Group::default());
            let blocks = self.groups.len() * self.per_group as usize;
            self.blocks.resize(blocks, Block { holders: 0, older: NONE, newer: NONE, entry: None });
            self.tokens.resize(blocks, [0; BLOCK_TOKENS]);
        }
        let per_group = self.per_group;
        self.change(number, |group| {
            group.pages = pages;
            group.free.extend((0..per_group).rev());
        });
        self.free += self.per_group;
        number
    }

    /// Every group number ever used.
    pub(super) fn group_numbers(&self) -> std::ops::Range<u32> {
        0..self.groups.len() as u32
    }

    /// The super-pages of a group; empty if it is not lent.
    pub(super) fn pages_of(&self, group: u32) -> &[u32] {
        &self.groups[group as usize].pages
    }

    /// What a group is used for.
    pub(super) fn group_use(&self, group: u32) -> GroupUse {
        self.groups[group as usize].used()
    }

    /// Gives a group up: nothing new goes there and nothing of it is found any more. Returns its
    /// pages if nobody holds a block of it; otherwise the last [`Blocks::release`] does.
    pub(super) fn leave(&mut self, number: u32) -> Option<Vec<u32>> {
        assert!(self.group_use(number) != GroupUse::Gone, "group {number} leaves once");
        for block in number * self.per_group..(number + 1) * self.per_group {
            if self.blocks[block as usize].entry.is_some() {
                self.unregister(block);
                if self.blocks[block as usize].holders == 0 {
                    self.unlink(block);
                    self.vacate(block);
                }
            }
        }
        self.change(number, |group| group.leaving = true);
        self.free -= self.groups[number as usize].free.len() as u32;
        if self.current == number {
            self.current = NONE;
        }
        self.take_pages(number)
    }

    /// A block for one sequence: a free one of the fullest group, else the least recently used
    /// cached one.
    pub(super) fn take(&mut self) -> Option<BlockId> {
        if self.free == 0 {
            if self.oldest == NONE {
                return None;
            }
            let block = self.oldest;
            self.unlink(block);
            self.unregister(block);
            self.vacate(block);
            self.current = block / self.per_group;
        }
        let current = self.groups.get(self.current as usize);
        if current.is_none_or(|group| group.leaving || group.free.is_empty()) {
            self.current = self.fullest();
        }
        let slot = self.groups[self.current as usize].free.pop();
        let slot = slot.expect("the fullest group has a free block");
        self.change(self.current, |group| group.held += 1);
        self.free -= 1;
        self.held += 1;
        let id = BlockId { group: self.current, slot };
        let index = self.flat(id);
        self.blocks[index as usize].holders = 1;
        Some(id)
    }

    /// The registered block that continues `prefix` with `tokens`, now held once more, and the
    /// prefix it makes.
    pub(super) fn reuse(
        &mut self,
        prefix: Prefix,
        tokens: &BlockTokens,
    ) -> Option<(BlockId, Prefix)> {
        let (block, made) = self.find(prefix, tokens)?;
        Some((self.hold(block), made))
    }

    /// A registered block that continues `prefix` and begins with some of the first of `tokens`
    /// (less than a block), now held once more, and with how many of them.
    pub(super) fn reuse_part(
        &mut self,
        prefix: Prefix,
        tokens: &[TokenId],
    ) -> Option<(BlockId, u32)> {
        let (block, alike) = self.find_part(prefix, tokens)?;
        Some((self.hold(block), alike as u32))
    }

    /// One more holder for a registered block.
    fn hold(&mut self, block: u32) -> BlockId {
        if self.blocks[block as usize].holders == 0 {
            self.unlink(block);
            self.change(block / self.per_group, |group| group.held += 1);
            self.held += 1;
        }
        self.blocks[block as usize].holders += 1;
        BlockId { group: block / self.per_group, slot: block % self.per_group }
    }

    /// Makes a full, computed block reusable, unless an equal one already is, and returns the
    /// prefix it makes.
    pub(super) fn register(&mut self, id: BlockId, prefix: Prefix, tokens: BlockTokens) -> Prefix {
        if let Some((_, made)) = self.find(prefix, &tokens) {
            return made;
        }
        self.next_serial += 1;
        let made = Prefix(self.next_serial);
        let hash = hash_of(prefix, &tokens);
        let block = self.flat(id);
        assert!(self.blocks[block as usize].holders > 0, "a registered block is held");
        // A block of a leaving group, or an equal hash of other tokens: not worth an entry.
        if !self.groups[id.group as usize].leaving && !self.index.contains_key(&hash) {
            assert!(self.blocks[block as usize].entry.is_none(), "a block is registered once");
            self.index.insert(hash, block);
            let entry = Entry { prefix, filled: BLOCK_TOKENS, hash, serial: made.0 };
            self.enter(block, entry, &tokens);
        }
        made
    }

    /// Lets the beginning of a block be found that will not be filled any more, unless as much of
    /// it is there already.
    pub(super) fn register_part(&mut self, id: BlockId, prefix: Prefix, tokens: &[TokenId]) {
        let block = self.flat(id);
        let leaving = self.groups[id.group as usize].leaving;
        let known = self.find_part(prefix, tokens);
        let there = known.is_some_and(|(_, alike)| alike == tokens.len());
        if leaving || there || tokens.len() < BEGINNINGS[0] {
            return;
        }
        assert!(self.blocks[block as usize].holders > 0, "a registered block is held");
        let entry = Entry { prefix, filled: tokens.len(), hash: 0, serial: 0 };
        self.enter(block, entry, tokens);
    }

    fn enter(&mut self, block: u32, entry: Entry, tokens: &[TokenId]) {
        for length in entry.beginnings() {
            self.beginnings.insert(hash_of(entry.prefix, &tokens[..length]), block);
        }
        self.blocks[block as usize].entry = Some(entry);
        self.tokens[block as usize][..tokens.len()].copy_from_slice(tokens);
    }

    /// A sequence gives a block back. The last holder's registered block stays as cache. Returns
    /// the pages of a leaving group that nobody holds any more.
    pub(super) fn release(&mut self, id: BlockId) -> Option<Vec<u32>> {
        let block = self.flat(id);
        let state = &mut self.blocks[block as usize];
        assert!(state.holders > 0, "a block is released by a holder");
        state.holders -= 1;
        if state.holders > 0 {
            return None;
        }
        let registered = state.entry.is_some();
        self.held -= 1;
        self.change(id.group, |group| group.held -= 1);
        if registered {
            self.link(block);
            return None;
        }
        self.vacate(block);
        self.take_pages(id.group)
    }

    fn flat(&self, id: BlockId) -> u32 {
        id.group * self.per_group + id.slot
    }

    /// Changes a group and keeps count of what groups are used for.
    fn change(&mut self, number: u32, change: impl FnOnce(&mut Group)) {
        let group = &mut self.groups[number as usize];
        let before = group.used();
        change(group);
        let after = group.used();
        self.empty_groups += u32::from(after == GroupUse::Empty);
        self.empty_groups -= u32::from(before == GroupUse::Empty);
        let cached = |used| matches!(used, GroupUse::CachedOnly(_));
        self.cached_groups += u32::from(cached(after));
        self.cached_groups -= u32::from(cached(before));
    }

    /// The group with the fewest free blocks that has one.
    fn fullest(&self) -> u32 {
        let open = self.groups.iter().enumerate().filter(|(_, group)| !group.leaving);
        let open = open.filter(|(_, group)| !group.free.is_empty());
        let fullest = open.min_by_key(|(_, group)| group.free.len());
        fullest.expect("a free block is in some group").0 as u32
    }

    fn find(&self, prefix: Prefix, tokens: &BlockTokens) -> Option<(u32, Prefix)> {
        let block = *self.index.get(&hash_of(prefix, tokens))?;
        let entry = self.blocks[block as usize].entry.expect("the index names registered blocks");
        let same = entry.prefix == prefix && self.tokens[block as usize] == *tokens;
        same.then_some((block, Prefix(entry.serial)))
    }

    fn find_part(&self, prefix: Prefix, tokens: &[TokenId]) -> Option<(u32, usize)> {
        BEGINNINGS.into_iter().rev().find_map(|length| {
            let hash = hash_of(prefix, tokens.get(..length)?);
            let block = *self.beginnings.get(&hash)?;
            let entry = self.blocks[block as usize].entry.expect("a registered block");
            let pairs = self.tokens[block as usize][..entry.filled].iter().zip(tokens);
            let alike = pairs.take_while(|(other, token)| other == token).count();
            (entry.prefix == prefix && alike >= length).then_some((block, alike))
        })
    }

    fn unregister(&mut self, block: u32) {
        let entry = self.blocks[block as usize].entry.take().expect("the block is registered");
        if entry.filled == BLOCK_TOKENS {
            self.index.remove(&entry.hash);
        }
        for length in entry.beginnings() {
            let hash = hash_of(entry.prefix, &self.tokens[block as usize][..length]);
            if self.beginnings.get(&hash) == Some(&block) {
                self.beginnings.remove(&hash);
            }
        }
    }

    /// Puts a block that nobody holds among the free ones.
    fn vacate(&mut self, block: u32) {
        let group = &mut self.groups[(block / self.per_group) as usize];
        group.free.push(block % self.per_group);
        if !group.leaving {
            self.free += 1;
        }
    }

    /// The pages of a leaving group without holders; its number becomes vacant.
    fn take_pages(&mut self, number: u32) -> Option<Vec<u32>> {
        let group = &mut self.groups[number as usize];
        if !group.leaving || group.held > 0 {
            return None;
        }
        assert!(group.cached == 0 && group.free.len() as u32 == self.per_group);
        group.leaving = false;
        group.free.clear();
        self.vacant.push(number);
        Some(std::mem::take(&mut group.pages))
    }

    /// Appends to the cached blocks.
    fn link(&mut self, block: u32) {
        let older = std::mem::replace(&mut self.newest, block);
        match older {
            NONE => self.oldest = block,
            older => self.blocks[older as usize].newer = block,
        }
        self.blocks[block as usize].older = older;
        self.blocks[block as usize].newer = NONE;
        self.change(block / self.per_group, |group| group.cached += 1);
        self.cached += 1;
    }

    /// Removes from the cached blocks.
    fn unlink(&mut self, block: u32) {
        let Block { older, newer, .. } = self.blocks[block as usize];
        match older {
            NONE => self.oldest = newer,
            older => self.blocks[older as usize].newer = newer,
        }
        match newer {
            NONE => self.newest = older,
            newer => self.blocks[newer as usize].older = older,
        }
        self.change(block / self.per_group, |group| group.cached -= 1);
        self.cached -= 1;
    }
}

impl Entry {
    /// How many of its tokens it is found by.
    fn beginnings(&self) -> impl Iterator<Item = usize> + use<> {
        let filled = self.filled;
        BEGINNINGS.into_iter().filter(move |length| *length <= filled)
    }
}

impl Group {
    fn used(&self) -> GroupUse {
        match (self.held, self.cached) {
            _ if self.leaving || self.pages.is_empty() => GroupUse::Gone,
            (0, 0) => GroupUse::Empty,
            (0, cached) => GroupUse::CachedOnly(cached),
            _ => GroupUse::Held,
        }
    }
}

fn hash_of(prefix: Prefix, tokens: &[TokenId]) -> u64 {
    let mut hasher = DefaultHasher::new();
    prefix.hash(&mut hasher);
    tokens.hash(&mut hasher);
    hasher.finish()
}

#[cfg(test)]
#[path = "blocks_tests.rs"]
mod tests;
