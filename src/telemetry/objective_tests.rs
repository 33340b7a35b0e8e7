//! What counts as answered within an objective.

use std::time::Duration;

use super::tests::{Page, request};
use super::{Ended, RequestReport, Setup, Telemetry};
use crate::error::ErrorKind;
use crate::model::ModelTask;
use crate::request::LaneId;

#[test]
fn only_answers_in_time_keep_an_objective() {
    let names = ["tight", "loose", "none"];
    let telemetry = Telemetry::new(Setup {
        models: names.map(|name| (name.to_owned(), ModelTask::Generate)).to_vec(),
        objectives: vec![Some(Duration::from_millis(2)), Some(Duration::from_millis(3)), None],
        ..Setup::default()
    });
    let within = || {
        let page = Page::of(&telemetry);
        let of = |name| format!("sconce_requests_within_objective_total{{model=\"{name}\"}}");
        names.map(|name| page.value(&of(name)))
    };
    assert_eq!(within(), [0.0; 3], "there from the start");
    for lane in [0, 1, 2] {
        // Three milliseconds each.
        telemetry.request_finished(&request(Some(LaneId(lane)), Ended::Ok));
    }
    assert_eq!(within(), [0.0, 1.0, 1.0]);
    for ended in [
        Ended::Cancelled,
        Ended::Failed(ErrorKind::DeadlineExceeded),
        Ended::Failed(ErrorKind::StepFailed),
        Ended::Failed(ErrorKind::InvalidRequest),
    ] {
        for lane in [Some(LaneId(1)), Some(LaneId(2)), None] {
            let duration = Duration::ZERO;
            let report = RequestReport { duration, ..request(lane, ended) };
            telemetry.request_finished(&report);
        }
    }
    telemetry.request_finished(&request(None, Ended::Ok));
    assert_eq!(within(), [0.0, 1.0, 1.0], "quick failures keep nothing");
}
