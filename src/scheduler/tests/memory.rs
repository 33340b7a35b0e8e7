//! Who gets which pages and blocks, what is reused, and what happens when there are too few.

use super::*;

/// Tokens that a request found in the prefix cache.
fn cached(rig: &mut Rig, id: u64, tenant: u32, text: &[TokenId]) -> u32 {
    let mut request = rig.request(id, 0, generation(text, 2));
    request.tenant = TenantId(tenant);
    rig.scheduler.admit(request);
    rig.finish(id).2.cached_tokens
}

#[test]
fn prefixes_are_reused_by_the_same_tenant_only() {
    let mut rig = Rig::new(40, vec![generating(8)]);
    assert_eq!(cached(&mut rig, 1, 5, &prompt(1, 70)), 0);
    assert_eq!(cached(&mut rig, 2, 5, &prompt(1, 70)), 64);
    assert_eq!(cached(&mut rig, 3, 6, &prompt(1, 70)), 0, "another tenant");
    let mut other = prompt(1, 70);
    other[40] = 999;
    assert_eq!(cached(&mut rig, 4, 5, &other), 40, "a block, and the same part of the second");
    other[0] = 999;
    assert_eq!(cached(&mut rig, 5, 5, &other), 0, "a block is only reused after its prefix");
}

#[test]
fn a_full_hit_computes_its_last_token_again_and_writes_no_shared_block() {
    let mut rig = Rig::new(40, vec![generating(8)]);
    assert_eq!(cached(&mut rig, 1, 0, &prompt(1, 64)), 0);
    rig.generate(2, 0, &prompt(1, 64), 40);
    let first = rig.turn(9);
    assert_eq!((first.spans[0].start, first.rows()), (63, 1));
    rig.generate(3, 0, &prompt(1, 64), 40);
    let both = rig.turn(9);
    let tables: Vec<_> = both.spans.iter().map(|span| both.table(span).to_vec()).collect();
    assert_eq!(tables[0][0], tables[1][0], "the first block is shared");
    assert_ne!(tables[0][1], tables[1][1], "the one that is written is not");
    assert_eq!((first.copies[0].to, both.copies[0].to), (tables[0][1], tables[1][1]));
    assert_eq!(both.copies, [BlockCopy { from: first.copies[0].from, to: tables[1][1] }]);
    assert_eq!(rig.finish(2).0 + rig.finish(3).0, 80);
}

#[test]
fn a_few_tokens_in_common_are_not_worth_a_copy() {
    let mut rig = Rig::new(40, vec![generating(8)]);
    assert_eq!(cached(&mut rig, 1, 0, &prompt(1, 40)), 0);
    for (id, same, reused) in [(2, 27, 27), (3, 15, 15), (4, 8, 8), (5, 7, 0)] {
        let mut text = prompt(1, 40);
        text[same..].fill(id as u32);
        assert_eq!(cached(&mut rig, id, 0, &text), reused, "{same} tokens alike");
    }
    // A prompt that ends within the block: its last token is computed.
    assert_eq!(cached(&mut rig, 6, 0, &prompt(1, 21)), 20);
}

#[test]
fn what_is_copied_stays_until_the_step_has_landed() {
    // Three blocks: a cached one, and the two that the second text takes.
    let mut rig = Rig::new(3, vec![generating(3)]);
    assert_eq!(cached(&mut rig, 1, 0, &prompt(1, 40)), 0);
    let mut text = prompt(1, 40);
    text[20] = 9;
    rig.generate(2, 0, &text, 56);
    let step = rig.plan();
    assert_eq!((step.copies.len(), rig.lane(0).blocks_used), (1, 3));
    rig.commit(&step, 9);
    assert_eq!(rig.lane(0).blocks_used, 2);
    // The third block is its own in time: it evicts what was copied.
    assert_eq!(rig.finish(2).0, 56);
}

#[test]
fn a_copy_is_not_made_where_its_source_is_the_room() {
    let mut rig = Rig::new(2, vec![generating(2)]);
    assert_eq!(cached(&mut rig, 1, 0, &prompt(1, 40)), 0);
    let mut text = prompt(1, 40);
    text[20] = 9;
    assert_eq!(cached(&mut rig, 2, 0, &text), 0, "both blocks are needed");
}

#[test]
fn generated_text_is_reused_too() {
    let mut rig = Rig::new(40, vec![generating(8)]);
    rig.generate(1, 0, &prompt(1, 30), 46);
    (0..46).for_each(|_| _ = rig.turn(77));
    let mut text = prompt(1, 30);
    text.extend([77; 46]);
    assert_eq!(cached(&mut rig, 2, 0, &text), 75, "all but the last token, which is not computed");
    text.extend(prompt(500, 20));
    assert_eq!(cached(&mut rig, 3, 0, &text), 76, "the next question of a conversation");
}

#[test]
fn the_least_recently_used_prefix_goes_first() {
    // Four blocks in all; each text leaves one cached.
    let mut rig = Rig::new(4, vec![generating(4)]);
    for (id, first) in [(1, 100), (2, 200), (3, 300)] {
        assert_eq!(cached(&mut rig, id, 0, &prompt(first, 34)), 0);
    }
    assert_eq!(cached(&mut rig, 4, 0, &prompt(100, 34)), 32, "used again");
    // Two blocks are needed: one is free, and the oldest cached one goes.
    assert_eq!(cached(&mut rig, 5, 0, &prompt(400, 34)), 0);
    assert_eq!(cached(&mut rig, 6, 0, &prompt(100, 34)), 32);
    assert_eq!(cached(&mut rig, 7, 0, &prompt(300, 34)), 32);
    assert_eq!(cached(&mut rig, 8, 0, &prompt(200, 34)), 0);
}

#[test]
fn the_youngest_makes_room_and_comes_back_with_the_same_text() {
    let mut rig = Rig::new(4, vec![generating(4)]);
    rig.generate(1, 0, &prompt(1, 40), 80);
    rig.generate(2, 0, &prompt(200, 40), 60);
    rig.turn(9);
    assert_eq!((rig.lane(0).running, rig.lane(0).blocks_used), (2, 4));
    // At 64 positions each wants a third block; there are four.
    while rig.lane(0).preemptions == 0 {
        rig.turn(9);
    }
    let load = rig.lane(0);
    assert_eq!((load.running, load.waiting, load.blocks_used), (1, 1, 3));
    let told = rig.hear(2).len();
    assert_eq!(load.waiting_tokens, 40 + told as u64);
    let (tokens, ..) = rig.finish(1);
    assert_eq!(tokens, 80, "the oldest was never preempted");
    let (tokens, finish, usage) = rig.finish(2);
    assert_eq!((told + tokens, finish), (60, Finish::Length));
    assert_eq!(usage, Usage { prompt_tokens: 40, cached_tokens: 0, generated_tokens: 60 });
    assert_eq!(rig.lane(0).preemptions, 1);
}

#[test]
fn a_preempted_sequence_continues_at_its_position() {
    let mut rig = Rig::new(4, vec![generating(4)]);
    rig.generate(1, 0, &prompt(1, 40), 80);
    rig.generate(2, 0, &prompt(200, 40), 60);
    while rig.lane(0).preemptions == 0 {
        rig.turn(9);
    }
    let known = rig.lane(0).waiting_tokens as u32;
    rig.scheduler.cancel(RequestId(1));
    let step = rig.turn(9);
    let span = &step.spans[0];
    assert_eq!(span.start + span.len() as u32, known, "all of its text is computed again");
    let Output::Sample { position, .. } = span.output else { panic!() };
    assert_eq!(position, known);
    assert_eq!(rig.scheduler.notes().recomputed_rows, known - 1 - span.start);
}

#[test]
fn blocks_of_steps_in_flight_are_not_preempted() {
    let mut rig = Rig::new(4, vec![generating(4)]);
    rig.generate(1, 0, &prompt(1, 63), 60);
    rig.generate(2, 0, &prompt(200, 40), 60);
    let first = rig.plan();
    assert_eq!(first.spans.len(), 2);
    rig.commit(&first, 9);
    let ahead = rig.plan();
    // The older one wants a third block; the younger one's are in flight.
    assert!(rig.plan_in(0).is_none());
    assert_eq!((rig.lane(0).preemptions, rig.lane(0).running), (0, 2));
    rig.commit(&ahead, 9);
    assert_eq!((rig.lane(0).preemptions, rig.lane(0).running), (1, 1));
    assert_eq!(rows(&rig.plan()), [(1, 1)]);
}

#[test]
fn the_oldest_waits_for_blocks_on_their_way_back() {
    let mut rig = Rig::new(4, vec![generating(4)]);
    rig.generate(1, 0, &prompt(1, 63), 9);
    rig.generate(2, 0, &prompt(200, 40), 9);
    let (first, second) = (rig.plan(), rig.plan());
    let outcome = Outcome { tokens: vec![9, 0], ..Outcome::default() };
    rig.scheduler.commit(Micros(9), &first, &outcome, &mut rig.said);
    // The second request has ended, but the step in flight still uses its blocks.
    assert!(rig.plan_in(0).is_none());
    rig.commit(&second, 9);
    assert_eq!((rows(&rig.plan()), rig.lane(0).preemptions), (vec![(1, 1)], 0));
}

#[test]
fn what_a_busy_lane_lacks_of_its_guarantee_is_held_back() {
    let mut rig = Rig::new(8, vec![generating(4), generating(4)]);
    rig.generate(9, 1, &prompt(1, 40), 30);
    rig.turn(9);
    for id in 0..3 {
        rig.generate(id, 0, &prompt(100 * id as u32, 40), 20);
    }
    rig.turn(9);
    assert_eq!((rig.lane(0).running, rig.load().kv_pages_lent), (2, 6));
    rig.generate(8, 1, &prompt(1, 40), 30);
    (0..3).for_each(|_| _ = rig.turn(9));
    assert_eq!((rig.lane(1).running, rig.load().kv_pages_lent), (2, 8));
    assert_eq!((rig.lane(0).preemptions, rig.lane(1).preemptions), (0, 0));
}

#[test]
fn an_idle_lane_is_borrowed_from_and_comes_back_to_its_guarantee() {
    let mut rig = Rig::new(8, vec![generating(4), generating(4)]);
    for id in 0..4 {
        rig.generate(id, 0, &prompt(100 * id as u32, 40), 20);
    }
    rig.turn(9);
    assert_eq!((rig.load().kv_pages_lent, rig.lane(0).running), (8, 4));
    rig.generate(9, 1, &prompt(1, 90), 30);
    rig.turn(9);
    let step = rig.turn(9);
    assert_eq!(step.lane, LaneId(1), "the borrowed pages came back at once");
    let lane = rig.lane(0);
    assert_eq!((lane.preemptions, lane.running, lane.waiting), (2, 2, 2));
    assert_eq!(rig.finish(9).0, 30);
    assert_eq!(rig.lane(1).preemptions, 0);
    let tokens: usize = (0..4).map(|id| rig.finish(id).0).sum();
    assert_eq!(tokens, 80);
}

#[test]
fn a_lane_loses_what_is_cheapest_to_compute_again() {
    let mut rig = Rig::new(8, vec![generating(4), generating(2)]);
    for (id, length) in [(1, 80), (2, 90), (3, 40)] {
        rig.generate(id, 0, &prompt(100 * id as u32, length), 5);
    }
    assert_eq!(rig.turn(9).spans.len(), 3);
    rig.generate(9, 1, &prompt(1, 40), 5);
    while rig.lane(1).running == 0 {
        rig.turn(9);
    }
    assert_eq!((rig.lane(0).running, rig.lane(0).preemptions), (2, 1));
    let waiting = 40 + rig.hear(3).len() as u64;
    assert_eq!(rig.lane(0).waiting_tokens, waiting, "the short one waits");
    assert_eq!((rig.finish(1).0, rig.finish(2).0), (5, 5));
    assert_eq!(rig.lane(0).preemptions, 1);
}

#[test]
fn cache_above_the_guarantee_goes_to_who_needs_it() {
    let mut rig = Rig::new(8, vec![generating(4), generating(2)]);
    // Lane 0 leaves six cached blocks in six groups, two above its guarantee.
    assert_eq!(cached(&mut rig, 1, 0, &prompt(1, 97)), 0);
    assert_eq!(cached(&mut rig, 2, 0, &prompt(500, 97)), 0);
    assert_eq!(rig.lane(0).blocks_cached, 6);
    // Lane 1 is guaranteed two and wants four: two are free, two are cache.
    rig.generate(3, 1, &prompt(1, 40), 20);
    rig.generate(4, 1, &prompt(1, 40), 20);
    let step = rig.turn(9);
    assert_eq!((step.lane, step.spans.len()), (LaneId(1), 2));
    assert_eq!((rig.lane(0).blocks_cached, rig.lane(0).preemptions), (4, 0));
    // No further: what the guarantee covers stays.
    rig.generate(5, 1, &prompt(1, 40), 20);
    let step = rig.turn(9);
    assert_eq!((step.spans.len(), rig.lane(0).blocks_cached), (2, 4));
}

#[test]
fn new_blocks_go_to_the_fullest_group() {
    let mut lane = generating(4);
    if let LaneKind::Generate { blocks_per_page, .. } = &mut lane.kind {
        *blocks_per_page = 4;
    }
    let mut rig = Rig::new(16, vec![lane]);
    rig.generate(1, 0, &prompt(1, 70), 20);
    rig.generate(2, 0, &prompt(200, 70), 20);
    let step = rig.turn(9);
    let groups: Vec<u32> = step.blocks.iter().map(|block| block.group).collect();
    assert_eq!(groups, [0, 0, 0, 0, 1, 1], "the first group is filled before the second");
    rig.scheduler.cancel(RequestId(1));
    rig.generate(3, 0, &prompt(400, 10), 5);
    let step = rig.turn(9);
    assert_eq!(step.table(&step.spans[1])[0].group, 1, "half full beats nearly empty");
}

#[test]
fn a_page_of_a_regranted_group_is_announced() {
    let mut rig = Rig::new(4, vec![generating(2), generating(2)]);
    rig.generate(1, 0, &prompt(1, 40), 20);
    rig.generate(2, 0, &prompt(100, 40), 20);
    let first = rig.turn(9);
    assert_eq!(first.grants.len(), 4);
    rig.scheduler.cancel(RequestId(1));
    rig.scheduler.cancel(RequestId(2));
    rig.generate(3, 1, &prompt(1, 40), 20);
    let second = rig.turn(9);
    assert_eq!((second.lane, second.grants.len()), (LaneId(1), 2));
    let pages = |step: &Step| -> Vec<u32> {
        step.grants.iter().flat_map(|grant| grant.pages.clone()).collect()
    };
    assert!(pages(&second).iter().all(|page| pages(&first).contains(page)));
}

#[test]
fn a_step_without_memory_is_planned_again_and_smaller() {
    let mut rig = Rig::new(40, vec![generating(8)]);
    rig.generate(1, 0, &prompt(1, 40), 3);
    let whole = rig.plan();
    assert_eq!(rows(&whole), [(1, 40)]);
    rig.put_back(&whole);
    assert_eq!((rig.lane(0).waiting, rig.lane(0).blocks_used), (1, 0));
    let half = rig.plan();
    assert_eq!(rows(&half), [(1, 20)]);
    rig.commit(&half, 9);
    assert!(rig.hear(1).is_empty());
    assert_eq!(rig.finish(1).0, 3);
}

#[test]
fn rows_that_follow_lost_ones_are_worth_nothing() {
    let mut rig = Rig::new(40, vec![generating(8)]);
    rig.generate(1, 0, &prompt(1, 40), 3);
    let (first, ahead) = (rig.plan(), rig.plan());
    rig.put_back(&first);
    assert!(rig.plan_in(0).is_none(), "it begins again when nothing of it is in flight");
    rig.commit(&ahead, 9);
    assert_eq!(rig.scheduler.notes().overrun_rows, 1);
    assert!(rig.hear(1).is_empty(), "a token of nothing is not said");
    let (tokens, finish, _) = rig.finish(1);
    assert_eq!((tokens, finish), (3, Finish::Length));
    assert_eq!((rig.lane(0).blocks_used, rig.lane(0).running), (0, 0));
}

#[test]
fn inputs_without_memory_are_encoded_once_each() {
    let mut rig = Rig::new(8, vec![encoding(100)]);
    rig.embed(1, 0, &[40, 40, 30]);
    let (first, ahead) = (rig.plan(), rig.plan());
    assert_eq!((rows(&first), rows(&ahead)), (vec![(1, 40), (1, 40)], vec![(1, 30)]));
    rig.put_back(&first);
    assert_eq!(rig.lane(0).waiting_tokens, 80);
    rig.commit(&ahead, 0);
    for part in [0, 1] {
        let step = rig.turn(0);
        assert_eq!((step.spans.len(), step.spans[0].part), (1, part), "half of what failed");
    }
    let heard = rig.hear(1);
    let index = |event: &Event| match event {
        Event::Vector { index, .. } => Some(*index),
        _ => None,
    };
    assert_eq!(heard.iter().filter_map(index).collect::<Vec<u32>>(), [2, 0, 1]);
    assert!(matches!(heard.last(), Some(Event::Done { .. })));
    // A client that leaves meanwhile leaves nothing behind.
    rig.embed(2, 0, &[40, 40]);
    let step = rig.plan();
    rig.put_back(&step);
    rig.scheduler.cancel(RequestId(2));
    assert_eq!((rig.lane(0).waiting_tokens, rig.lane(0).running), (0, 0));
    assert!(rig.plan_in(0).is_none() && rig.scheduler.is_idle());
}
