//! The page as Prometheus reads it, and the ledger's sums.

use std::collections::{BTreeMap, BTreeSet};

use super::cost::{Ledger, Price, Waste};
use super::metrics::{self, Kind};
use super::*;
use crate::request::Usage;
use crate::scheduler::LaneLoad;

const CHAT: LaneId = LaneId(0);
const EMBED: LaneId = LaneId(1);

fn setup() -> Setup {
    Setup {
        models: vec![
            ("chat".to_owned(), ModelTask::Generate),
            ("embed".to_owned(), ModelTask::Embed),
        ],
        device_hourly_usd: Some(3.6),
        device_share: 0.5,
        config_hash: "abc".to_owned(),
        device_name: "cpu".to_owned(),
        ..Setup::default()
    }
}

/// Samples by series, and families as (name, type, help), of one page.
pub(super) struct Page {
    samples: BTreeMap<String, f64>,
    families: BTreeSet<(String, String, String)>,
}

impl Page {
    fn read(text: &str) -> Page {
        let mut page = Page { samples: BTreeMap::new(), families: BTreeSet::new() };
        let (mut name, mut help) = ("", "");
        for line in text.lines().filter(|line| !line.is_empty()) {
            if let Some(rest) = line.strip_prefix("# HELP ") {
                (name, help) = rest.split_once(' ').unwrap();
            } else if let Some(rest) = line.strip_prefix("# TYPE ") {
                let (typed, kind) = rest.split_once(' ').unwrap();
                assert_eq!(typed, name, "help comes right before type");
                let family = (name.to_owned(), kind.to_owned(), help.to_owned());
                assert!(page.families.insert(family), "{name} comes twice");
            } else {
                assert!(line.starts_with(name), "{line} stands under {name}");
                let (series, value) = line.rsplit_once(' ').unwrap();
                let value = value.parse().unwrap();
                assert!(page.samples.insert(series.to_owned(), value).is_none(), "{line}");
            }
        }
        page
    }

    pub(super) fn of(telemetry: &Telemetry) -> Page {
        Page::read(&telemetry.render())
    }

    #[track_caller]
    pub(super) fn value(&self, series: &str) -> f64 {
        *self.samples.get(series).unwrap_or_else(|| panic!("no {series}"))
    }

    /// The sum over all series of a family.
    fn sum(&self, family: &str) -> f64 {
        let mine = |series: &&String| series.split('{').next() == Some(family);
        self.samples.keys().filter(mine).map(|series| self.samples[series]).sum()
    }
}

fn step(lane: LaneId, busy: u64) -> StepReport {
    StepReport {
        lane,
        kind: StepKind::Decode,
        spans: 3,
        rows: 3,
        busy: Micros(busy),
        elapsed: Micros(busy),
        work: Micros(busy / 2),
        wasted_cancelled: Micros(0),
        wasted_preempted: Micros(0),
    }
}

pub(super) fn request(lane: Option<LaneId>, ended: Ended) -> RequestReport {
    RequestReport {
        lane,
        tenant: TenantId(0),
        task: ModelTask::Generate,
        ended,
        duration: Duration::from_millis(3),
        usage: Usage { prompt_tokens: 10, cached_tokens: 4, generated_tokens: 7 },
    }
}

/// Renaming a family breaks dashboards and scalers: the committed list says what is promised.
/// `UPDATE_GOLDEN=1 cargo test --lib telemetry` writes it anew.
#[test]
fn families_are_the_committed_ones() {
    let page = Page::of(&Telemetry::new(setup()));
    let lines = page.families.iter().map(|(name, kind, help)| format!("{name} {kind} {help}\n"));
    let shown: String = lines.collect();
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/metrics.txt");
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        std::fs::write(path, &shown).unwrap();
    }
    assert_eq!(shown, std::fs::read_to_string(path).unwrap());
}

#[test]
fn every_family_is_there_from_the_start_and_none_is_a_summary() {
    let page = Page::of(&Telemetry::new(setup()));
    let shown: BTreeSet<_> =
        page.families.iter().map(|(name, kind, _)| (&name[..], &kind[..])).collect();
    let table: BTreeSet<_> = metrics::ALL.iter().map(|f| (f.name, f.kind.as_str())).collect();
    assert_eq!(shown, table);
    assert!(page.families.iter().all(|(_, kind, _)| kind != "summary"));
    for series in [
        "sconce_queue_depth",
        "sconce_rejections_total{model=\"embed\",reason=\"max_wait\"}",
        "sconce_rejections_total{model=\"unknown\",reason=\"draining\"}",
        "sconce_requests_total{model=\"chat\",task=\"generate\",outcome=\"cut\"}",
        "sconce_step_rows_count{model=\"chat\",kind=\"mixed\"}",
        "sconce_inter_token_latency_seconds_count{model=\"chat\"}",
        "sconce_tenant_requests_total{tenant=\"anonymous\",outcome=\"ok\"}",
        "sconce_drain_requests_total{result=\"handed_over\"}",
        "sconce_cost_usd_total{model=\"\",state=\"idle\"}",
    ] {
        page.value(series);
    }
    assert_eq!(page.value("sconce_model_state{model=\"chat\",state=\"absent\"}"), 1.0);
    assert_eq!(page.sum("sconce_phase"), 1.0);
}

/// Exactly one family may match `sconce_*cost*_total`, and zero would read as free.
#[test]
fn cost_is_shown_only_with_a_price() {
    let costs = |page: &Page| {
        let cost = |name: &str| name.contains("cost") && name.ends_with("_total");
        page.families.iter().filter(|(name, ..)| cost(name)).count()
    };
    assert_eq!(costs(&Page::of(&Telemetry::new(setup()))), 1);
    let page = Page::of(&Telemetry::new(Setup { device_hourly_usd: None, ..setup() }));
    assert_eq!(costs(&page), 0);
    assert!(!page.samples.contains_key("sconce_device_price_usd_per_hour"));
    assert_eq!(page.value("sconce_device_share_ratio"), 0.5);
}

#[test]
fn the_table_keeps_the_naming_rules() {
    let mut names = BTreeSet::new();
    for family in metrics::ALL {
        let name = family.name;
        assert!(names.insert(name), "{name} comes twice");
        let ours = name.starts_with("sconce_") || name == "process_start_time_seconds";
        assert!(ours && family.help.ends_with('.'), "{name}");
        assert!(!family.help.contains('\n') && !family.help.contains('\\'), "{name}");
        assert!(name.contains(family.unit), "{name} names its unit");
        let counter = matches!(family.kind, Kind::Counter | Kind::NanoCounter);
        assert_eq!(name.ends_with("_total"), counter, "{name}");
        assert_eq!(family.kind == Kind::Histogram, !family.buckets.is_empty(), "{name}");
        assert!(family.buckets.is_sorted_by(|a, b| a < b), "{name}");
    }
}

#[test]
fn requests_count_once_under_their_outcome() {
    let telemetry = Telemetry::new(setup());
    telemetry.request_finished(&request(Some(CHAT), Ended::Ok));
    telemetry.request_finished(&request(Some(CHAT), Ended::Cancelled));
    telemetry.request_finished(&request(Some(CHAT), Ended::Failed(ErrorKind::QueueFull)));
    telemetry.request_finished(&request(Some(CHAT), Ended::Failed(ErrorKind::DeadlineExceeded)));
    telemetry.request_finished(&request(Some(CHAT), Ended::Failed(ErrorKind::Cut)));
    telemetry.request_finished(&request(Some(CHAT), Ended::Failed(ErrorKind::StepFailed)));
    telemetry.request_finished(&request(None, Ended::Failed(ErrorKind::ModelNotFound)));
    telemetry.rejected(Some(CHAT), Rejection::QueueFull);
    telemetry.rejected(None, Rejection::TooLarge);
    let page = Page::of(&telemetry);
    assert_eq!(page.sum("sconce_requests_total"), 7.0);
    for outcome in ["ok", "cancelled", "rejected", "timeout", "cut", "error"] {
        let labels = format!("{{model=\"chat\",task=\"generate\",outcome=\"{outcome}\"}}");
        assert_eq!(page.value(&format!("sconce_requests_total{labels}")), 1.0, "{outcome}");
    }
    let unknown = "{model=\"unknown\",task=\"generate\",outcome=\"client_error\"}";
    assert_eq!(page.value(&format!("sconce_requests_total{unknown}")), 1.0);
    let name = "sconce_request_duration_seconds";
    assert_eq!(page.value(&format!("{name}_count{{model=\"chat\",task=\"generate\"}}")), 4.0);
    let below = format!("{name}_bucket{{model=\"chat\",task=\"generate\",le=\"0.0025\"}}");
    let above = format!("{name}_bucket{{model=\"chat\",task=\"generate\",le=\"0.005\"}}");
    assert_eq!((page.value(&below), page.value(&above)), (0.0, 4.0));
    assert_eq!(page.value("sconce_rejections_total{model=\"chat\",reason=\"queue_full\"}"), 1.0);
    assert_eq!(page.value("sconce_rejections_total{model=\"unknown\",reason=\"too_large\"}"), 1.0);
    assert_eq!(page.value("sconce_prompt_tokens_total{model=\"chat\"}"), 60.0);
    assert_eq!(page.value("sconce_prompt_tokens_cached_total{model=\"chat\"}"), 24.0);
    let tenant =
        |kind| format!("sconce_tenant_tokens_total{{tenant=\"anonymous\",kind=\"{kind}\"}}");
    let tokens = ["prompt", "cached", "generated"].map(|kind| page.value(&tenant(kind)));
    assert_eq!(tokens, [42.0, 28.0, 49.0]);
}

#[test]
fn tenants_have_series_of_their_own_until_there_are_too_many() {
    let telemetry = Telemetry::new(setup());
    assert_eq!(telemetry.tenant("acme"), Some(TenantId(1)));
    assert_eq!(telemetry.tenant("acme"), Some(TenantId(1)), "the same name, the same tenant");
    assert_eq!(telemetry.tenant("anonymous"), Some(TenantId(0)));
    assert_eq!(telemetry.tenant("unknown"), None, "that is the name of everybody else");
    for id in [1, 2, 3, u32::MAX] {
        let report = RequestReport { tenant: TenantId(id), ..request(Some(CHAT), Ended::Ok) };
        telemetry.request_finished(&report);
    }
    let page = Page::of(&telemetry);
    let of = |tenant| format!("sconce_tenant_requests_total{{tenant=\"{tenant}\",outcome=\"ok\"}}");
    assert_eq!((page.value(&of("acme")), page.value(&of("unknown"))), (1.0, 3.0));
    let ids: BTreeSet<_> = (0..1_000).map(|n| telemetry.tenant(&format!("t{n}"))).collect();
    assert!(ids.contains(&None) && ids.len() < 100, "{} ids", ids.len());
    let series = telemetry.render().lines().filter(|line| line.contains("tenant=")).count();
    assert!(series < 1_000, "{series} series");
}

#[test]
fn gauges_show_what_was_published() {
    let telemetry = Telemetry::new(setup());
    let chat = LaneLoad {
        waiting: 2,
        waiting_tokens: 50,
        waiting_work: Micros(1_500_000),
        start_delay: Micros(500_000),
        token_delay: 10_000.0,
        seats: 1,
        running: 3,
        blocks_used: 8,
        blocks_cached: 4,
        preemptions: 9,
    };
    let embed = LaneLoad { waiting: 1, waiting_tokens: 5, ..LaneLoad::default() };
    let load =
        Load { lanes: vec![chat, embed], oldest: Some(Micros(0)), kv_pages_lent: 7, kv_usage: 0.5 };
    telemetry.kv_layout(CHAT, 30, 4);
    telemetry.kv_limit(600);
    telemetry.publish(&load);
    telemetry.submitted(CHAT, 100);
    telemetry.submitted(EMBED, 10);
    telemetry.received(EMBED, 10);
    telemetry.in_flight(4);
    telemetry.in_flight(-1);
    let snapshot = telemetry.snapshot();
    assert_eq!((snapshot.inbox, snapshot.inbox_tokens, snapshot.in_flight), (1, 100, 3));
    assert_eq!(snapshot.inbox_work, [Micros(3_000_000), Micros(0)], "as waiting tokens cost");
    assert_eq!(snapshot.inbox_delay, [Micros(1_000_000), Micros(0)], "there is a seat");
    assert_eq!(snapshot.load.lanes[0].running, 3);
    assert_eq!(snapshot.load.kv_pages_lent, 7);
    std::thread::sleep(Duration::from_millis(2));
    let page = Page::of(&telemetry);
    assert_eq!(page.value("sconce_queue_depth"), 4.0);
    assert_eq!(page.value("sconce_queue_tokens"), 155.0);
    assert_eq!(page.value("sconce_queue_work_seconds"), 1.5);
    assert!(page.value("sconce_queue_oldest_age_seconds") >= 0.002);
    assert_eq!(page.value("sconce_requests_running"), 3.0);
    assert_eq!(page.value("sconce_requests_in_flight"), 3.0);
    assert_eq!(page.value("sconce_kv_usage_ratio"), 0.5);
    assert_eq!(page.value("sconce_model_queue_depth{model=\"embed\"}"), 1.0);
    assert_eq!(page.value("sconce_kv_pages{model=\"chat\",state=\"used\"}"), 60.0);
    assert_eq!(page.value("sconce_kv_pages{model=\"chat\",state=\"cached\"}"), 30.0);
    assert_eq!(page.value("sconce_kv_pages_limit"), 600.0);
    assert_eq!(page.value("sconce_preemptions_total{model=\"chat\"}"), 9.0);
    telemetry.publish(&Load { lanes: vec![LaneLoad::default(); 2], ..Load::default() });
    let page = Page::of(&telemetry);
    assert_eq!(page.value("sconce_queue_oldest_age_seconds"), 0.0);
    assert_eq!(page.value("sconce_queue_depth"), 1.0);
}

#[test]
fn the_rest_of_the_events_reach_their_series() {
    let telemetry = Telemetry::new(setup());
    telemetry.scheduled(CHAT, Micros(2_000));
    telemetry.first_token(CHAT, Micros(7_000));
    telemetry.next_token(CHAT, Micros(9_000));
    telemetry.memory(100, 200, 50, 1_000);
    telemetry.model_state(EMBED, ModelState::Ready);
    telemetry.device_error("fatal");
    telemetry.stage_finished(CHAT, "load", Duration::from_secs(2));
    telemetry.stage_finished(CHAT, "warm", Duration::from_secs(1));
    telemetry.phase_entered("ready");
    telemetry.stage_finished(CHAT, "load", Duration::from_secs(5));
    telemetry.drained("cut");
    telemetry.drain_deadline(Duration::from_secs(30));
    telemetry.upkeep();
    let page = Page::of(&telemetry);
    assert_eq!(page.value("sconce_queue_wait_seconds_sum{model=\"chat\"}"), 0.002);
    assert_eq!(page.value("sconce_time_to_first_token_seconds_sum{model=\"chat\"}"), 0.007);
    assert_eq!(page.value("sconce_inter_token_latency_seconds_sum{model=\"chat\"}"), 0.009);
    assert_eq!(page.value("sconce_device_memory_bytes{use=\"free\"}"), 650.0);
    assert_eq!(page.sum("sconce_device_memory_bytes"), 1_000.0);
    assert_eq!(page.value("sconce_model_state{model=\"embed\",state=\"ready\"}"), 1.0);
    assert_eq!(page.value("sconce_model_state{model=\"embed\",state=\"absent\"}"), 0.0);
    assert_eq!(page.value("sconce_device_errors_total{kind=\"fatal\"}"), 1.0);
    assert_eq!(page.value("sconce_start_seconds{stage=\"load\"}"), 2.0, "not the second load");
    assert_eq!(page.value("sconce_model_load_seconds{model=\"chat\"}"), 5.0, "the second load");
    assert_eq!(page.value("sconce_phase{phase=\"ready\"}"), 1.0);
    assert_eq!(page.sum("sconce_phase"), 1.0);
    assert_eq!(page.value("sconce_drain_requests_total{result=\"cut\"}"), 1.0);
    let unix = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs_f64();
    let deadline = page.value("sconce_drain_deadline_timestamp_seconds");
    assert!((deadline - unix - 30.0).abs() < 1.0);
    assert!((page.value("process_start_time_seconds") - unix).abs() < 10.0);
}

/// The whole way: events with real time in, sums out of the page.
#[test]
fn busy_load_and_idle_are_the_wall_time_and_the_cost() {
    let telemetry = Telemetry::new(setup());
    let spend = |micros: u64| std::thread::sleep(Duration::from_micros(micros));
    let load = telemetry.occupy();
    spend(3_000);
    telemetry.load_finished(CHAT, Micros(3_000));
    drop(load);
    for lane in [CHAT, EMBED, CHAT] {
        let work = telemetry.occupy();
        spend(2_000);
        telemetry.step_finished(&step(lane, 2_000), &[(TenantId(0), 2)]);
        drop(work);
        spend(500);
    }
    let before = telemetry.nanos();
    let page = Page::of(&telemetry);
    let after = telemetry.nanos();
    assert_eq!(page.value("sconce_device_busy_seconds_total{model=\"chat\"}"), 0.004);
    assert_eq!(page.value("sconce_device_load_seconds_total{model=\"chat\"}"), 0.003);
    assert_eq!(page.value("sconce_device_work_seconds_total{model=\"embed\"}"), 0.001);
    let parts = ["busy", "load", "idle"].map(|part| format!("sconce_device_{part}_seconds_total"));
    let wall: f64 = parts.iter().map(|part| page.sum(part)).sum();
    assert!(wall >= before as f64 / 1e9 - 1e-8 && wall <= after as f64 / 1e9 + 1e-8);
    // 3.6 USD an hour, half of it ours: 0.0005 USD a second.
    assert!((page.sum("sconce_cost_usd_total") - wall * 0.0005).abs() < 1e-8);
    assert_eq!(page.sum("sconce_tenant_device_seconds_total"), 0.006);
    assert_eq!(
        page.value("sconce_step_duration_seconds_count{model=\"chat\",kind=\"decode\"}"),
        2.0
    );
    assert_eq!(page.value("sconce_step_rows_sum{model=\"chat\",kind=\"decode\"}"), 6.0);
}

/// A small counter-based generator: the tests need repeatable, not good, randomness.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (self.0 >> 33) % sides
    }
}

/// Busy, load and idle of all lanes.
fn sums(ledger: &Ledger, lanes: usize) -> (u64, u64, u64) {
    let busy = (0..lanes).map(|lane| ledger.lane(lane).busy()).sum();
    let load = (0..lanes).map(|lane| ledger.lane(lane).load()).sum();
    (busy, load, ledger.idle())
}

/// Random days: steps on two slots, loads beside them, scrapes at any moment, measured times that
/// are a little off, charges that nobody announced.
#[test]
fn the_ledger_adds_up_whatever_happens() {
    const LANES: usize = 3;
    for seed in 0..200 {
        let mut dice = Dice(seed);
        let ledger = Ledger::new(LANES, 3);
        let price = Price::new(1.0 + dice.roll(9) as f64 / 7.0, 0.25);
        let (mut now, mut idle, mut open): (u64, u64, Vec<u64>) = (0, 0, Vec::new());
        for _ in 0..300 {
            now += dice.roll(3_000_000);
            let lane = LaneId(dice.roll(LANES as u64) as u16);
            match dice.roll(6) {
                0 | 1 if open.len() < 2 => {
                    ledger.open(now);
                    open.push(now);
                }
                2 if !open.is_empty() => {
                    let began = open.remove(0);
                    let busy = (now - began) * (95 + dice.roll(10)) / 100;
                    let rows = [(TenantId(0), 2), (TenantId(7), dice.roll(5) as u32)];
                    ledger.step(lane, busy, &rows, now);
                    ledger.close();
                }
                3 if !open.is_empty() => {
                    ledger.load(lane, now - open.remove(0), now);
                    ledger.close();
                }
                4 => ledger.settle(now),
                5 => {
                    ledger.step(lane, dice.roll(1_000_000), &[(TenantId(1), 1)], now);
                }
                _ => {}
            }
            let (busy, load, idle_now) = sums(&ledger, LANES);
            assert!(busy + load + idle_now <= now, "seed {seed}: more than there was");
            assert!(idle_now >= idle, "seed {seed}: a counter fell");
            idle = idle_now;
        }
        open.iter().for_each(|_| ledger.close());
        ledger.settle(now);
        let (busy, load, idle) = sums(&ledger, LANES);
        assert_eq!(busy + load + idle, now, "seed {seed}");
        let tenants = (0..3).flat_map(|t| (0..LANES).map(move |l| (t, l)));
        let shared: u64 = tenants.map(|(tenant, lane)| ledger.tenant(tenant, lane)).sum();
        assert_eq!(shared, busy, "seed {seed}: tenants and models");
        let parts = (0..LANES).flat_map(|l| [ledger.lane(l).busy(), ledger.lane(l).load()]);
        let cost: u64 = parts.chain([idle]).map(|time| price.of(time)).sum();
        let rounding = 2 * LANES as u64 + 1;
        assert!(price.of(now) - cost <= rounding, "seed {seed}: {cost} of {}", price.of(now));
    }
}

/// With the device marked as taken, a scrape in the middle of a step costs nothing.
#[test]
fn a_scrape_during_a_step_does_not_make_it_idle() {
    let ledger = Ledger::new(1, 1);
    ledger.open(1_000);
    ledger.settle(5_000);
    assert_eq!(ledger.idle(), 1_000);
    assert_eq!(ledger.step(LaneId(0), 9_000, &[(TenantId(0), 1)], 10_000), 9_000);
    ledger.close();
    ledger.settle(12_000);
    assert_eq!(sums(&ledger, 1), (9_000, 0, 3_000));
    ledger.waste(LaneId(0), Waste::Cut, 5);
    assert_eq!(ledger.lane(0).wasted(Waste::Cut as usize), 5);
}

#[test]
fn waste_is_a_part_of_busy() {
    let telemetry = Telemetry::new(setup());
    std::thread::sleep(Duration::from_millis(2));
    let report = StepReport {
        wasted_cancelled: Micros(600),
        wasted_preempted: Micros(700),
        ..step(CHAT, 1_000)
    };
    telemetry.step_finished(&report, &[(TenantId(0), report.rows)]);
    let page = Page::of(&telemetry);
    let wasted = |reason| {
        format!("sconce_device_wasted_seconds_total{{model=\"chat\",reason=\"{reason}\"}}")
    };
    assert_eq!(page.value(&wasted("cancelled")), 0.0006);
    assert_eq!(page.value(&wasted("preempted")), 0.0004);
}

#[test]
fn label_values_are_escaped() {
    let telemetry = Telemetry::new(setup());
    telemetry.tenant("a\"b\\c\nd").unwrap();
    let text = telemetry.render();
    assert!(text.contains("seconds_total{tenant=\"a\\\"b\\\\c\\nd\",model=\"chat\"} 0.000000000"));
}

#[tokio::test]
async fn settled_waits_for_a_scrape_only_if_somebody_scrapes() {
    let telemetry = Telemetry::new(setup());
    let within = |limit| tokio::time::timeout(Duration::from_millis(limit), telemetry.settled());
    telemetry.device_error("step");
    assert!(within(1_000).await.is_ok(), "nobody has ever scraped");
    telemetry.render();
    telemetry.scraped();
    assert!(within(1_000).await.is_ok(), "nothing has changed since");
    telemetry.device_error("step");
    assert!(within(20).await.is_err(), "the change was not seen yet");
    let scrape = async {
        telemetry.render();
        telemetry.scraped();
    };
    let (settled, ()) = tokio::join!(within(1_000), scrape);
    assert!(settled.is_ok());
}

/// The shortest of 20 renderings of each page, in turns: on a busy machine too, they compare.
pub(super) fn rendering(pages: [&Telemetry; 2]) -> [Duration; 2] {
    let mut best = [Duration::MAX; 2];
    for round in 0..20 {
        for (telemetry, best) in pages.iter().zip(&mut best) {
            telemetry.step_finished(&step(LaneId(0), round), &[]);
            let begun = Instant::now();
            telemetry.render();
            *best = begun.elapsed().min(*best);
        }
    }
    best
}

/// A scrape must be cheap: routers ask every 50 ms. On a quiet machine it takes 2 ms for 16
/// models.
#[test]
fn rendering_takes_time_in_proportion_to_models() {
    let [few, many] = [4, 16].map(|models| {
        let models = (0..models).map(|i| (format!("model-{i}"), ModelTask::Generate)).collect();
        Telemetry::new(Setup { models, ..setup() })
    });
    let [few, many] = rendering([&few, &many]);
    assert!(many < 8 * few, "4 models {few:?}, 16 models {many:?}");
}
