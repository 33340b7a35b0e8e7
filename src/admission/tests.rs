//! Admission without HTTP.

use std::future::poll_fn;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use super::testing::{CONTEXT, advance, ended, front, metric, outcomes};
use super::ticket::Ticket;
use super::{CHARACTERS_PER_TOKEN_MAX, Front};
use crate::config::Config;
use crate::error::{Error, ErrorKind};
use crate::lifecycle::{Notice, Phase};
use crate::model::ModelTask;
use crate::request::{Detail, Generate, Micros, Sampling, Task, Usage};
use crate::scheduler::{LaneLoad, Load};
use crate::telemetry::request_log::RequestLog;
use crate::text::Message;

fn ticket(front: &Arc<Front>) -> Ticket {
    Ticket::new(Arc::clone(front), ModelTask::Generate, RequestLog::new("id".into()))
}

fn task(prompt: usize) -> Task {
    Task::Generate(Generate {
        prompt: vec![7; prompt].into(),
        max_tokens: 1,
        stop_tokens: Arc::default(),
        sampling: Sampling::default(),
        detail: Detail::default(),
    })
}

fn refused(front: &Arc<Front>, name: &str) -> Error {
    let mut ticket = ticket(front);
    let error = front.enter(&mut ticket, name, ModelTask::Generate).expect_err("refused");
    ticket.fail(&error);
    error
}

fn rejections(front: &Front, model: &str, reason: &str) -> f64 {
    metric(front, "sconce_rejections_total", &[("model", model), ("reason", reason)])
}

#[tokio::test]
async fn who_may_enter() {
    let (front, _inbox) = front(Config::default());
    let error = refused(&front, "tinny");
    assert_eq!(error.kind(), ErrorKind::ModelNotFound);
    assert!(error.message().contains("'tiny'"), "{error}");
    assert_eq!(refused(&front, "org/vec").kind(), ErrorKind::InvalidRequest);
    let late = refused(&front, "late");
    assert_eq!((late.kind(), late.wait()), (ErrorKind::ModelLoading, Some(Duration::from_secs(7))));
    assert_eq!(rejections(&front, "late", "loading"), 1.0);
    let mut alias = ticket(&front);
    let entry = front.enter(&mut alias, "gpt-x", ModelTask::Generate).unwrap();
    assert_eq!(entry.model.name, "tiny");
    advance(&front.lifecycle, Phase::Draining);
    assert_eq!(refused(&front, "tiny").kind(), ErrorKind::Draining);
    assert_eq!(rejections(&front, "tiny", "draining"), 1.0);
    assert_eq!(outcomes(&front, "unknown", "generate", "client_error"), 1.0);
    assert_eq!(ended(&front), 4.0);
}

#[tokio::test]
async fn every_ticket_is_counted_once_and_leaves_the_gauge() {
    let (front, _inbox) = front(Config::default());
    let in_flight = || (front.telemetry.snapshot().in_flight, front.lifecycle.in_flight());
    let enter = || {
        let mut ticket = ticket(&front);
        front.enter(&mut ticket, "tiny", ModelTask::Generate).unwrap();
        ticket
    };
    let (mut answered, gone, mut failed) = (enter(), enter(), enter());
    assert_eq!(in_flight(), (3, 3));
    answered.finish(Usage { generated_tokens: 5, ..Usage::default() });
    failed.fail(&Error::new(ErrorKind::StepFailed, "x"));
    failed.fail(&Error::new(ErrorKind::InvalidRequest, "the first failure counts"));
    drop((answered, gone, failed));
    assert_eq!(in_flight(), (0, 0));
    for outcome in ["ok", "cancelled", "error"] {
        assert_eq!(outcomes(&front, "tiny", "generate", outcome), 1.0, "{outcome}");
    }
    assert_eq!(metric(&front, "sconce_generated_tokens_total", &[("model", "tiny")]), 5.0);
    let open = enter();
    advance(&front.lifecycle, Phase::Stopped);
    drop(open);
    assert_eq!(outcomes(&front, "tiny", "generate", "cut"), 1.0);
    assert_eq!(ended(&front), 4.0);
}

#[tokio::test]
async fn submits_all_or_none() {
    let mut config = Config::default();
    config.limits.queue_requests = 3;
    let (front, mut inbox) = front(config);
    let mut first = ticket(&front);
    let model = front.enter(&mut first, "tiny", ModelTask::Generate).unwrap().model;
    let receivers = front.submit(&mut first, model, vec![task(2), task(3)]).unwrap();
    assert_eq!(receivers.len(), 2);
    let snapshot = front.telemetry.snapshot();
    assert_eq!((snapshot.inbox, snapshot.inbox_tokens), (2, 5));
    let mut second = ticket(&front);
    let error = front.submit(&mut second, model, vec![task(1), task(1)]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::QueueFull);
    second.fail(&error);
    drop(second);
    assert_eq!(front.telemetry.snapshot().inbox, 2);
    let (a, b) = (inbox.recv().await.unwrap(), inbox.recv().await.unwrap());
    assert!(a.request.id < b.request.id);
    assert_eq!(a.request.deadline, Some(a.request.arrived.plus(Micros(600_000_000))));
    // What is in the inbox may be more than telemetry has heard of: the channel bounds it too.
    front.telemetry.received(model.lane, 2);
    front.telemetry.received(model.lane, 3);
    let fill: Vec<_> = (0..3).map(|_| front.inbox.try_reserve().unwrap()).collect();
    let mut third = ticket(&front);
    let error = front.submit(&mut third, model, vec![task(1)]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::QueueFull);
    drop(fill);
    drop(inbox);
    let error = front.submit(&mut third, model, vec![task(1)]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::DeviceFailed);
}

#[tokio::test]
async fn choices_share_their_prompt() {
    let mut config = Config::default();
    config.limits.queue_tokens = 10;
    let (front, _inbox) = front(config);
    let choice = |choice| match task(10) {
        Task::Generate(first) => {
            let sampling = Sampling { choice, ..first.sampling };
            Task::Generate(Generate { sampling, ..first })
        }
        other => other,
    };
    let mut ticket = ticket(&front);
    let model = front.enter(&mut ticket, "tiny", ModelTask::Generate).unwrap().model;
    front.submit(&mut ticket, model, (0..4).map(choice).collect()).unwrap();
    let snapshot = front.telemetry.snapshot();
    assert_eq!((snapshot.inbox, snapshot.inbox_tokens), (4, 10));
}

#[tokio::test]
async fn a_drain_finishes_only_what_was_submitted() {
    let (front, _inbox) = front(Config::default());
    front.lifecycle.notify(Notice { source: "drain", within: None, terminate: false });
    let enter = || {
        let mut ticket = ticket(&front);
        let model = front.enter(&mut ticket, "tiny", ModelTask::Generate).unwrap().model;
        (ticket, model)
    };
    let (mut refused, _) = enter();
    refused.fail(&Error::new(ErrorKind::ContextLengthExceeded, "too long"));
    drop((refused, enter()));
    assert_eq!(front.lifecycle.summary().finished, 0);
    // A tokenizer's answer needs no engine.
    let (mut tokenised, _) = enter();
    tokenised.finish(Usage::default());
    let (mut answered, model) = enter();
    front.submit(&mut answered, model, vec![task(1)]).unwrap();
    answered.finish(Usage::default());
    let (mut left, model) = enter();
    front.submit(&mut left, model, vec![task(1)]).unwrap();
    drop((tokenised, answered, left));
    let summary = front.lifecycle.summary();
    assert_eq!((summary.finished, summary.cut), (3, 0));
}

#[tokio::test]
async fn refuses_a_long_predicted_wait() {
    let (front, _inbox) = front(Config::default());
    let busy = LaneLoad { waiting: 1, start_delay: Micros(31_000_000), ..LaneLoad::default() };
    front.telemetry.publish(&Load { lanes: vec![busy], ..Load::default() });
    let mut ticket = ticket(&front);
    let model = front.enter(&mut ticket, "tiny", ModelTask::Generate).unwrap().model;
    let error = front.submit(&mut ticket, model, vec![task(1)]).unwrap_err();
    assert!(error.message().contains("limits.max_wait_seconds"), "{error}");
    ticket.fail(&error);
    drop(ticket);
    assert_eq!(rejections(&front, "tiny", "max_wait"), 1.0);
    assert_eq!(outcomes(&front, "tiny", "generate", "rejected"), 1.0);
}

#[tokio::test]
async fn text_that_cannot_fit_is_not_tokenised() {
    let (front, _inbox) = front(Config::default());
    let text = front.catalog.find("tiny").unwrap().text().unwrap();
    let most = CONTEXT as usize * CHARACTERS_PER_TOKEN_MAX;
    let fits = front.encode_prompts(text, vec!["é".repeat(most)], CONTEXT).await.unwrap();
    assert_eq!(fits[0].len(), 2 * most);
    let long = vec!["a".into(), "a".repeat(most + 1)];
    let error = front.encode_prompts(text, long, CONTEXT).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ContextLengthExceeded);
    assert!(error.message().contains("input 1") && error.message().contains("1025"), "{error}");
}

#[tokio::test]
async fn heavy_work_leaves_the_thread_and_reports_a_panic() {
    let (front, _inbox) = front(Config::default());
    let here = std::thread::current().id();
    let thread = || Ok(std::thread::current().id());
    assert_eq!(front.heavy(Micros(10), thread).await.unwrap(), here);
    assert_ne!(front.heavy(Micros(10_000), thread).await.unwrap(), here);
    for expected in [10, 10_000] {
        let failing = front.heavy::<()>(Micros(expected), || panic!("on purpose"));
        assert_eq!(failing.await.unwrap_err().kind(), ErrorKind::Internal);
    }
    // Many messages are work, however short. All places for work are taken, so it cannot be done
    // before anybody looks.
    let places = front.heavy.available_permits() as u32;
    let _taken = front.heavy.acquire_many(places).await.unwrap();
    let text = front.catalog.find("tiny").unwrap().text().unwrap();
    for (count, here) in [(2, true), (40, false)] {
        let message = Message { role: "user".into(), content: "a".into() };
        let mut rendering =
            std::pin::pin!(front.render(text, vec![message; count], vec![], CONTEXT));
        let at_once = poll_fn(|context| Poll::Ready(rendering.as_mut().poll(context).is_ready()));
        assert_eq!(at_once.await, here, "{count} messages");
    }
}

#[tokio::test]
async fn the_lower_time_limit_holds() {
    let (front, _inbox) = front(Config::default());
    let mut ticket = ticket(&front);
    let left = |ticket: &Ticket| ticket.deadline().since(ticket.arrived()).as_seconds();
    assert_eq!(left(&ticket), 600.0);
    ticket.limit_time("1e30").unwrap();
    assert_eq!(left(&ticket), 600.0);
    ticket.limit_time(" 2.5 ").unwrap();
    assert_eq!(left(&ticket), 2.5);
    for wrong in ["", "x", "-1", "0", "nan"] {
        assert!(ticket.limit_time(wrong).is_err(), "{wrong}");
    }
    assert_eq!(left(&ticket), 2.5);
}
