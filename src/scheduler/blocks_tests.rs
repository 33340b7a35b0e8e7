//! Tests of one lane's block accounting.

use super::*;

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
