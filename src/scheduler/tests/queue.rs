//! Who goes next, what a step is made of, and how requests end.

use super::*;
use crate::scheduler::step::{Input, Seat, StepKind};

#[test]
fn a_generation_goes_from_prompt_to_length() {
    let mut rig = Rig::new(4, vec![generating(4)]);
    rig.generate(7, 0, &prompt(10, 40), 3);
    let first = rig.turn(101);
    assert_eq!((rows(&first), first.kind), (vec![(7, 40)], StepKind::Prefill));
    assert_eq!(first.grants.len(), 2, "blocks for 40 tokens, in groups of one");
    assert_eq!(first.table(&first.spans[0]).len(), 2);
    let second = rig.turn(102);
    assert_eq!((rows(&second), second.kind), (vec![(7, 1)], StepKind::Decode));
    assert_eq!((second.tokens[0], second.spans[0].input), (101, Input::Known));
    assert!(second.grants.is_empty());
    let Output::Sample { position, .. } = second.spans[0].output else { panic!() };
    assert_eq!((second.spans[0].start, position), (40, 41));
    assert_eq!(rig.finish(7).0, 3);
    assert!(rig.scheduler.is_idle());
    let load = rig.load();
    // A full one, and the beginning of another.
    assert_eq!((load.lanes[0].blocks_used, load.lanes[0].blocks_cached), (0, 2));
}

#[test]
fn rows_run_ahead_through_their_seat_and_never_past_the_length() {
    let mut rig = Rig::new(4, vec![generating(4)]);
    rig.generate(1, 0, &[5, 6], 3);
    let first = rig.plan();
    let second = rig.plan();
    let Output::Sample { seat, .. } = first.spans[0].output else { panic!() };
    assert_eq!(second.spans[0].input, Input::Seat(seat));
    rig.commit(&first, 50);
    let third = rig.plan();
    rig.commit(&second, 51);
    assert!(rig.plan_in(0).is_none(), "three tokens are planned already");
    rig.commit(&third, 52);
    let told = rig.hear(1);
    assert!(matches!(
        told[..],
        [
            Event::Token(50),
            Event::Token(51),
            Event::Token(52),
            Event::Done { finish: Finish::Length, .. }
        ]
    ));
}

#[test]
fn a_stop_token_discards_the_row_that_ran_ahead() {
    let mut rig = Rig::new(4, vec![generating(4)]);
    rig.generate(1, 0, &prompt(1, 31), 20);
    let first = rig.plan();
    let second = rig.plan();
    rig.commit(&first, 0);
    let told = rig.hear(1);
    let usage = Usage { prompt_tokens: 31, cached_tokens: 0, generated_tokens: 0 };
    let [Event::Done { finish: Finish::Stop, usage: told }] = told[..] else { panic!("{told:?}") };
    assert_eq!(told, usage);
    assert_eq!(rig.lane(0).blocks_used, 1, "the step in flight still uses the block");
    assert!(!rig.scheduler.is_idle());
    rig.commit(&second, 9);
    assert_eq!(rig.scheduler.notes().overrun_rows, 1);
    assert!(rig.hear(1).is_empty() && rig.scheduler.is_idle());
    assert_eq!(rig.lane(0).blocks_used, 0);
}

#[test]
fn decodes_and_prompt_chunks_share_a_step() {
    let target = Micros(200);
    let mut rig = Rig::with(1, target, 64, vec![generating(16)]);
    rig.generate(1, 0, &[1], 50);
    rig.turn(9);
    rig.generate(2, 0, &prompt(1, 300), 5);
    let step = rig.turn(9);
    assert_eq!((rows(&step), step.kind), (vec![(1, 1), (2, 96)], StepKind::Mixed));
    assert!(step.predicted <= target);
    assert_eq!(step.spans[1].output, Output::None);
    let step = rig.turn(9);
    assert_eq!((rows(&step), step.spans[1].start), (vec![(1, 1), (2, 96)], 96));
    rig.turn(9);
    let step = rig.turn(9);
    assert_eq!(rows(&step), [(1, 1), (2, 12)]);
    assert!(matches!(step.spans[1].output, Output::Sample { position: 300, .. }));
    let step = rig.turn(9);
    assert_eq!((rows(&step), step.kind), (vec![(1, 1), (2, 1)], StepKind::Decode));
}

#[test]
fn encoders_take_longer_steps_while_nothing_is_generated() {
    let mut rig = Rig::with(1, Micros(200), 64, vec![generating(4), encoding(4096)]);
    rig.embed(1, 1, &[16; 200]);
    let alone = rig.turn(9);
    assert!(alone.predicted > Micros(400) && alone.predicted <= Micros(600), "{alone:?}");
    rig.generate(2, 0, &[1], 50);
    let beside = loop {
        let step = rig.turn(9);
        if step.kind == StepKind::Encode {
            break step;
        }
    };
    assert!(beside.predicted <= Micros(200), "{beside:?}");
}

#[test]
fn a_prompt_advances_however_many_rows_decode() {
    let mut lane = generating(16);
    lane.cost = (Micros(100), Micros(1000));
    let mut rig = Rig::with(1, Micros(200), 200, vec![lane]);
    for id in 0..6 {
        rig.generate(id, 0, &[1], 40);
    }
    while rig.lane(0).running < 6 {
        rig.turn(9);
    }
    rig.generate(6, 0, &prompt(1, 40), 5);
    let step = rig.turn(9);
    // Two rows are within twice the time of one; all six decode in turn.
    assert_eq!(step.spans.iter().filter(|span| span.len() == 1).count(), 2);
    assert_eq!(rows(&step).last(), Some(&(6, 32)));
    let mut served = [0; 7];
    for _ in 0..12 {
        rig.turn(9).spans.iter().for_each(|span| served[span.request.0 as usize] += 1);
    }
    assert!(served.iter().all(|&steps| steps >= 1), "{served:?}");
}

#[test]
fn a_long_fixed_part_does_not_split_the_decode_rows() {
    let mut lane = generating(4);
    lane.cost = (Micros(50_000), Micros(10));
    let mut rig = Rig::with(1, Micros(8000), 64, vec![lane]);
    (0..8).for_each(|id| rig.generate(id, 0, &[1], 10));
    while rig.lane(0).running < 8 {
        rig.turn(9);
    }
    assert_eq!(rig.turn(9).rows(), 8);
}

#[test]
fn the_lane_behind_its_share_goes_first() {
    let mut lanes = vec![encoding(64), encoding(64)];
    lanes[1].weight = 3.0;
    let mut rig = Rig::new(0, lanes);
    for id in 0..80 {
        rig.embed(id, (id % 2) as u16, &[64]);
    }
    let heavy = (0..40).filter(|_| rig.turn(0).lane == LaneId(1)).count();
    assert_eq!(heavy, 30);
}

#[test]
fn a_lane_runs_in_one_slot_at_a_time() {
    let mut rig = Rig::with(2, Micros(8000), 8, vec![generating(4), encoding(64)]);
    rig.generate(1, 0, &[1], 5);
    let chat = rig.plan_in(0).expect("work");
    assert!(rig.plan_in(1).is_none(), "the only lane with work is in the other slot");
    rig.embed(2, 1, &[10]);
    let bulk = rig.plan_in(1).expect("the other lane");
    assert_eq!((chat.slot, bulk.slot, bulk.lane), (SlotId(0), SlotId(1), LaneId(1)));
    rig.commit(&bulk, 0);
    rig.commit(&chat, 9);
    assert!(rig.plan_in(1).is_some_and(|step| step.lane == LaneId(0)));
}

#[test]
fn inputs_are_packed_in_order_and_never_split() {
    let mut rig = Rig::new(0, vec![encoding(100)]);
    rig.embed(1, 0, &[60, 50]);
    rig.embed(2, 0, &[50, 100]);
    assert_eq!((rig.lane(0).waiting, rig.lane(0).waiting_tokens), (2, 260));
    assert_eq!(rows(&rig.turn(0)), [(1, 60)]);
    assert!(matches!(rig.hear(1)[..], [Event::Vector { index: 0, .. }]));
    assert_eq!(rows(&rig.turn(0)), [(1, 50), (2, 50)]);
    let [Event::Vector { index: 1, .. }, Event::Done { finish: Finish::Complete, usage }] =
        rig.hear(1)[..]
    else {
        panic!()
    };
    assert_eq!(usage.prompt_tokens, 110);
    assert_eq!((rig.lane(0).waiting, rig.lane(0).running), (0, 1));
    assert_eq!(rows(&rig.turn(0)), [(2, 100)]);
    assert_eq!(rig.hear(2).len(), 3);
    assert!(rig.scheduler.is_idle());
}

#[test]
fn a_cancelled_request_is_never_heard_of_again() {
    let mut rig = Rig::new(8, vec![generating(4), encoding(64)]);
    rig.generate(1, 0, &[1, 2], 9);
    rig.generate(2, 0, &[1, 2], 9);
    rig.embed(3, 1, &[64, 64]);
    rig.scheduler.cancel(RequestId(2));
    rig.scheduler.cancel(RequestId(99));
    let (chat, bulk) = (rig.plan(), rig.plan());
    assert_eq!((rows(&chat), rows(&bulk)), (vec![(1, 2)], vec![(3, 64)]));
    rig.hear(1);
    rig.scheduler.cancel(RequestId(1));
    rig.scheduler.cancel(RequestId(3));
    assert!(!rig.scheduler.is_idle(), "their rows are in flight");
    rig.commit(&chat, 9);
    assert_eq!(rig.scheduler.notes().cancelled_rows, 2);
    rig.commit(&bulk, 9);
    assert_eq!(rig.scheduler.notes().cancelled_rows, 64);
    assert!(rig.said.is_empty() && rig.scheduler.is_idle());
    assert_eq!(rig.lane(0).blocks_used, 0);
}

#[test]
fn a_deadline_ends_only_what_never_started() {
    let mut lane = generating(4);
    if let LaneKind::Generate { seats, .. } = &mut lane.kind {
        *seats = 1;
    }
    let mut rig = Rig::new(8, vec![lane]);
    for id in [1, 2] {
        let mut request = rig.request(id, 0, generation(&[1], 50));
        request.deadline = Some(Micros(10));
        rig.scheduler.admit(request);
    }
    rig.turn(9);
    rig.now = 20;
    rig.turn(9);
    let told = rig.hear(2);
    let [Event::Failed(error)] = &told[..] else { panic!("{told:?}") };
    assert_eq!(error.kind(), ErrorKind::DeadlineExceeded);
    assert_eq!(rig.finish(1).0, 50);
}

#[test]
fn a_failed_step_ends_its_requests_and_repeats_its_grants() {
    let mut rig = Rig::new(8, vec![generating(4)]);
    rig.generate(1, 0, &[1], 9);
    let first = rig.plan();
    rig.generate(2, 0, &[2], 2);
    let second = rig.plan();
    let error = Error::new(ErrorKind::StepFailed, "it failed");
    rig.scheduler.abandon(&first, &error, &mut rig.said);
    rig.scheduler.check();
    assert!(matches!(rig.hear(1)[..], [Event::Failed(_)]));
    rig.commit(&second, 9);
    assert!(rig.hear(1).is_empty());
    let third = rig.plan();
    assert_eq!(third.grants, first.grants);
    rig.commit(&third, 9);
    assert_eq!(rig.hear(2).len(), 3);
    assert!(rig.scheduler.is_idle());
}

#[test]
fn a_drain_ends_everything_once() {
    let mut rig = Rig::new(8, vec![generating(4), encoding(64)]);
    rig.generate(1, 0, &[1], 9);
    let step = rig.plan();
    rig.generate(2, 0, &[1], 9);
    rig.embed(3, 1, &[5]);
    let error = Error::new(ErrorKind::Cut, "drained");
    rig.scheduler.fail_all(&error, &mut rig.said);
    rig.scheduler.check();
    for id in 1..=3 {
        assert!(matches!(rig.hear(id)[..], [Event::Failed(_)]));
    }
    assert!(rig.plan_in(0).is_none());
    rig.commit(&step, 9);
    assert!(rig.said.is_empty() && rig.scheduler.is_idle());
}

#[test]
fn notes_tell_waits_and_gaps() {
    let mut rig = Rig::new(8, vec![generating(4)]);
    rig.generate(1, 0, &[1], 9);
    rig.now = 50;
    let step = rig.plan();
    let note = rig.scheduler.notes().scheduled[0];
    assert_eq!((note.request, note.lane, note.waited), (RequestId(1), LaneId(0), Micros(51)));
    rig.now = 99;
    rig.commit(&step, 9);
    let note = rig.scheduler.notes().tokens[0];
    assert_eq!(note.request, RequestId(1));
    assert_eq!((note.lane, note.first, note.after), (LaneId(0), true, Micros(100)));
    let step = rig.plan();
    assert!(rig.scheduler.notes().scheduled.is_empty());
    rig.commit(&step, 9);
    let note = rig.scheduler.notes().tokens[0];
    assert_eq!((note.first, note.after), (false, Micros(2)));
}

#[test]
fn only_who_finds_no_seat_waits_for_answers() {
    let mut rig = Rig::with(1, Micros(1000), 64, vec![generating(16)]);
    let works = |rig: &Rig| (rig.lane(0).start_delay.0, rig.lane(0).waiting_work.0);
    for id in 1..=8 {
        rig.generate(id, 0, &prompt(1, 4), 100);
    }
    let (start, all) = works(&rig);
    assert!(start > 0 && all > 5 * start, "prompts {start}, with answers {all}");
    for id in 9..=16 {
        rig.generate(id, 0, &prompt(1, 4), 100);
    }
    let (half, all) = works(&rig);
    assert!(half.abs_diff((2 * start + all) / 2) <= 2, "8 of 16 have seats: {half} of {all}");
    rig.turn(9);
    let (start, all) = works(&rig);
    assert!(start >= all && start > 0, "seats are taken: {start} of {all}");
    assert_eq!(rig.lane(0).seats, 0);
}

#[test]
fn without_blocks_a_seat_is_no_place() {
    let mut rig = Rig::with(1, Micros(1000), 4, vec![generating(4)]);
    rig.generate(1, 0, &prompt(1, 100), 20);
    rig.turn(9);
    rig.generate(2, 0, &prompt(2, 100), 20);
    let before = rig.lane(0);
    assert!(before.start_delay < before.waiting_work, "{before:?}");
    rig.turn(9);
    let after = rig.lane(0);
    assert!(after.waiting == 1 && after.start_delay >= after.waiting_work, "{after:?}");
}

#[test]
fn work_is_what_a_full_step_would_have_taken() {
    let mut rig = Rig::with(1, Micros(1000), 64, vec![generating(16)]);
    rig.generate(1, 0, &prompt(1, 256), 5);
    assert!((250..=700).contains(&rig.lane(0).waiting_work.0), "{:?}", rig.lane(0));
    let full = rig.turn(9);
    let work = rig.scheduler.work(&full).0.abs_diff(full.predicted.0);
    assert!(full.rows() == 256 && work <= 2, "a full step is worth its time");
    let lone = rig.turn(9);
    assert_eq!(lone.rows(), 1);
    assert!(rig.scheduler.work(&lone).0 <= lone.predicted.0 / 10);
}

#[test]
fn seats_are_lent_and_come_back() {
    let mut rig = Rig::new(64, vec![generating(4)]);
    (0..20).for_each(|id| rig.generate(id, 0, &[1], 2));
    let step = rig.turn(9);
    let mut seats: Vec<Seat> = step
        .spans
        .iter()
        .map(|span| match span.output {
            Output::Sample { seat, .. } => seat,
            _ => panic!(),
        })
        .collect();
    seats.dedup();
    assert_eq!((seats.len(), rig.lane(0).running, rig.lane(0).waiting), (8, 8, 12));
    assert_eq!(rig.load().oldest, Some(Micros(0)));
    (0..20).for_each(|id| assert_eq!(rig.finish(id).0, 2));
    assert!(rig.load().oldest.is_none());
}

#[test]
#[should_panic(expected = "do not hold one sequence")]
fn a_guarantee_below_one_sequence_is_refused() {
    let mut lane = generating(4);
    if let LaneKind::Generate { context, .. } = &mut lane.kind {
        *context = 129;
    }
    Rig::new(8, vec![lane]);
}

#[test]
#[should_panic(expected = "exceed the pool")]
fn guarantees_beyond_the_pool_are_refused() {
    Rig::new(7, vec![generating(4), generating(4)]);
}

#[test]
#[should_panic(expected = "is admitted once")]
fn an_id_is_used_once() {
    let mut rig = Rig::new(4, vec![generating(4)]);
    rig.generate(1, 0, &[1], 1);
    rig.generate(1, 0, &[1], 1);
}
