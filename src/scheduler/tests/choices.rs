//! Several choices of one prompt, and tokens that are asked for in detail.

use super::*;
use crate::request::{Adjustment, Logprobs};
use crate::scheduler::step::Input;

#[test]
fn choices_of_a_prompt_compute_it_once() {
    let mut rig = Rig::new(64, vec![generating(16)]);
    let shared: std::sync::Arc<[TokenId]> = prompt(1, 70).into();
    for choice in 0..4 {
        let Task::Generate(mut task) = generation(&[], 5) else { unreachable!() };
        task.prompt = std::sync::Arc::clone(&shared);
        task.sampling.choice = choice;
        let request = rig.request(u64::from(choice), 0, Task::Generate(task));
        rig.scheduler.admit(request);
    }
    rig.generate(9, 0, &prompt(500, 8), 5);
    let first = rig.plan();
    assert_eq!(rows(&first), [(0, 70)], "the others wait for its blocks");
    // The first choice runs ahead; its prompt is not committed yet.
    let second = rig.plan();
    assert_eq!(rows(&second), [(0, 1)]);
    rig.commit(&first, 50);
    let third = rig.plan();
    assert_eq!(rows(&third), [(0, 1), (1, 6), (2, 6), (3, 6), (9, 8)]);
    let blocks = |index: usize| third.table(&third.spans[index])[..2].to_vec();
    assert!((1..4).all(|index| blocks(index) == blocks(0)), "two blocks in common");
    rig.commit(&second, 51);
    rig.commit(&third, 52);
    for id in 1..4 {
        assert_eq!(
            rig.finish(id).2,
            Usage { prompt_tokens: 70, cached_tokens: 64, generated_tokens: 5 }
        );
    }
}

#[test]
fn choices_do_not_wait_for_one_that_is_gone_or_shares_nothing() {
    let mut rig = Rig::new(64, vec![generating(16)]);
    let ask = |rig: &mut Rig, id: u64, prompt: &std::sync::Arc<[TokenId]>| {
        let Task::Generate(mut task) = generation(&[], 5) else { unreachable!() };
        task.prompt = std::sync::Arc::clone(prompt);
        task.sampling.choice = id as u32 % 10;
        let request = rig.request(id, 0, Task::Generate(task));
        rig.scheduler.admit(request);
    };
    // Less than a block and its last token: nothing to share.
    let short = prompt(1, 32).into();
    (0..3).for_each(|id| ask(&mut rig, id, &short));
    let step = rig.plan();
    assert_eq!(rows(&step), [(0, 32), (1, 32), (2, 32)]);
    rig.commit(&step, 0);
    let long = prompt(1, 300).into();
    (10..12).for_each(|id| ask(&mut rig, id, &long));
    assert_eq!(rows(&rig.plan())[0].0, 10);
    rig.scheduler.cancel(RequestId(10));
    assert_eq!(rows(&rig.plan())[0].0, 11);
}

#[test]
fn what_looks_back_is_never_two_tokens_behind() {
    let config = SchedulerConfig {
        step_target: Micros(1_000_000),
        quiet_target: Micros(0),
        slots: 1,
        depth: 3,
        kv_pages: 8,
    };
    let mut rig = Rig::new(8, vec![generating(4)]);
    rig.scheduler = Scheduler::new(config, vec![generating(4)]);
    let Task::Generate(mut task) = generation(&[5, 6], 9) else { unreachable!() };
    let adjustment = Adjustment { presence: 1.0, ..Adjustment::default() };
    task.detail = Detail { adjustment: Some(adjustment.into()), logprobs: Some(2) };
    let request = rig.request(1, 0, Task::Generate(task));
    rig.scheduler.admit(request);
    let first = rig.plan();
    let detail = &first.details[0];
    assert_eq!((detail.span, &detail.prompt[..], detail.generated.len()), (0, &[5, 6][..], 0));
    let second = rig.plan();
    assert!(matches!(second.spans[0].input, Input::Seat(_)) && second.history.is_empty());
    assert!(rig.plan_in(0).is_none(), "two tokens would be unknown");
    let commit = |rig: &mut Rig, step: &Step, token| {
        let logprobs = vec![Logprobs { chosen: -1.0, top: vec![(token, -1.0)] }];
        let tokens = vec![token];
        let outcome = Outcome { elapsed: Micros(9), tokens, logprobs, vectors: vec![] };
        rig.scheduler.commit(Micros(rig.now), step, &outcome, &mut rig.said);
    };
    commit(&mut rig, &first, 50);
    let third = rig.plan();
    assert_eq!(third.history, [50], "and 51 is in the seat");
    commit(&mut rig, &second, 51);
    let told = rig.hear(1);
    let [Event::Scored { token: 50, .. }, Event::Scored { token: 51, logprobs }] = &told[..] else {
        panic!("{told:?}")
    };
    assert_eq!(logprobs.top, [(51, -1.0)]);
}
