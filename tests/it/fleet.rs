//! A day of a fleet on a virtual clock: arrivals, pods that come and go, and the series that they
//! would export, as OpenMetrics. The scaler is the manifests' own. Knows no Prometheus.

use std::collections::{BTreeMap, VecDeque};
use std::fmt::Write;

use crate::hpa::{Hpa, Metric, SYNC_SECONDS};

/// Seconds of the day's run.
pub(crate) const DAY: usize = 24 * 3600;
/// Seconds between two scrapes.
pub(crate) const SCRAPE: usize = 30;
/// Midnight of a Monday.
pub(crate) const MIDNIGHT: usize = 1_767_571_200;
/// USD an hour of each pod's device.
pub(crate) const PRICE: f64 = 0.8048;
/// Seconds within which a request should be answered.
pub(crate) const OBJECTIVE: usize = 20;

/// Requests that a pod works on at the same time, each as fast as alone.
const SEATS: usize = 16;
/// Refuse when the predicted wait is longer (limits.max_wait_seconds).
const MAX_WAIT: usize = 30;
/// Seconds of work of a request.
const WORK: usize = 8;
/// A pod's process runs this long before it is ready: weights and warm-up.
const LOADING: usize = 60;
/// And its node takes this long before.
const NODE: usize = 90;
/// Tokens of a request: prompt, answer.
const TOKENS: (f64, f64) = (200.0, 120.0);
/// Upper bounds of the duration's buckets, as the server has them.
const BUCKETS: [usize; 4] = [5, 10, 30, 60];

/// One pod, from its creation to its end.
#[derive(Debug, Default)]
struct Pod {
    name: usize,
    created: usize,
    /// Set when it is to go: it takes nothing new and finishes what it has.
    leaving: bool,
    /// Since when it has had nothing left to do and lingers for a last scrape.
    done: Option<usize>,
    /// When each request arrived, and when it will be done.
    running: Vec<(usize, usize)>,
    waiting: VecDeque<usize>,
    counters: Counters,
    /// Scrapes of the last two minutes: waiting, in flight.
    scraped: VecDeque<(usize, f64, f64)>,
}

#[derive(Debug, Default, Clone)]
struct Counters {
    answered: f64,
    within: f64,
    buckets: [f64; BUCKETS.len()],
    duration: f64,
    busy: f64,
    loading: f64,
    idle: f64,
    work: f64,
}

impl Pod {
    fn runs(&self, now: usize) -> bool {
        now >= self.created + NODE
    }

    fn ready(&self, now: usize) -> bool {
        now >= self.created + NODE + LOADING && !self.leaving
    }

    fn in_flight(&self) -> usize {
        self.running.len() + self.waiting.len()
    }

    fn tick(&mut self, now: usize) {
        let runs = self.runs(now);
        let counters = &mut self.counters;
        self.running.retain(|(arrived, done)| {
            if *done <= now {
                let took = now - arrived;
                counters.answered += 1.0;
                counters.within += f64::from(u8::from(took <= OBJECTIVE));
                counters.duration += took as f64;
                for (bucket, bound) in counters.buckets.iter_mut().zip(BUCKETS) {
                    *bucket += f64::from(u8::from(took <= bound));
                }
            }
            *done > now
        });
        while self.running.len() < SEATS
            && let Some(arrived) = self.waiting.pop_front()
        {
            self.running.push((arrived, now + WORK));
        }
        if !runs {
            return;
        }
        let load = self.running.len() as f64 / SEATS as f64;
        // A device is held longer than full batches would need: a step with one row takes more
        // than a sixteenth of a full one.
        let busy = if load > 0.0 { 0.4 + 0.6 * load } else { 0.0 };
        let loading = now < self.created + NODE + LOADING;
        counters.loading += f64::from(u8::from(loading));
        counters.busy += busy;
        counters.idle += f64::from(u8::from(!loading)) - busy;
        counters.work += load;
    }
}

/// What the scaler saw and did at one decision.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Decision {
    /// Seconds since midnight.
    pub(crate) at: usize,
    pub(crate) queue: f64,
    pub(crate) in_flight: f64,
    pub(crate) asked: u32,
}

/// A day's run.
pub(crate) struct Day {
    pub(crate) decisions: Vec<Decision>,
    /// Seconds that each pod's process ran, all together.
    pub(crate) pod_seconds: f64,
    pub(crate) admitted: usize,
    pub(crate) refused: usize,
    lines: BTreeMap<&'static str, String>,
}

/// A generator that gives the same day each time.
struct Random(u64);

impl Random {
    fn next(&mut self) -> f64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) as f64 / (1u64 << 53) as f64
    }

    /// A Poisson number by Knuth's product, for small means.
    fn poisson(&mut self, mean: f64) -> usize {
        let (limit, mut product, mut count) = ((-mean).exp(), self.next(), 0);
        while product > limit {
            product *= self.next();
            count += 1;
        }
        count
    }
}

/// Requests a second: a quiet night, a working day with two hills, and at two o'clock a crowd that
/// is more than all pods together can serve.
fn rate(at: usize) -> f64 {
    let hour = at as f64 / 3600.0;
    let hill = |middle: f64, width: f64| (-((hour - middle) / width).powi(2)).exp();
    let usual = 0.08 + 4.5 * hill(10.5, 1.8) + 4.0 * hill(15.5, 2.0) + 1.2 * hill(20.5, 1.2);
    let crowd = if (14 * 3600..14 * 3600 + 2400).contains(&at) { 9.0 } else { 1.0 };
    usual * crowd
}

impl Day {
    /// Runs it. At eleven a spot node is taken back.
    pub(crate) fn run(hpa: &mut Hpa, thresholds: [f64; 2]) -> Self {
        let mut random = Random(0x5c0ce);
        let mut day = Self {
            decisions: Vec::new(),
            pod_seconds: 0.0,
            admitted: 0,
            refused: 0,
            lines: BTreeMap::new(),
        };
        // The evening before has left one pod.
        let mut pods = vec![Pod::default()];
        let mut gone: Vec<Pod> = Vec::new();
        let mut names = 1;
        let mut asked = 1;
        let start = NODE + LOADING;
        for now in start..start + DAY {
            let at = now - start;
            for _ in 0..random.poisson(rate(at)) {
                let ready: Vec<usize> =
                    (0..pods.len()).filter(|pod| pods[*pod].ready(now)).collect();
                let chosen = ready[(random.next() * ready.len() as f64) as usize];
                if pods[chosen].waiting.len() * WORK < MAX_WAIT * SEATS {
                    pods[chosen].waiting.push_back(now);
                    day.admitted += 1;
                } else {
                    day.refused += 1;
                }
            }
            pods.iter_mut().for_each(|pod| pod.tick(now));
            day.pod_seconds += pods.iter().filter(|pod| pod.runs(now)).count() as f64;
            if at == 11 * 3600 {
                pods[0].leaving = true;
            }
            if at.is_multiple_of(SCRAPE) {
                day.scrape(at, now, &mut pods, asked, hpa);
            }
            if at.is_multiple_of(SYNC_SECONDS as usize) {
                let metrics = measure(at, pods.iter().chain(&gone));
                let [queue, in_flight] = metrics;
                let metrics: Vec<Metric> = metrics.into_iter().zip(thresholds).collect();
                asked = hpa.decide(at as f64, asked, &metrics);
                day.decisions.push(Decision { at, queue, in_flight, asked });
            }
            let staying = pods.iter().filter(|pod| !pod.leaving).count();
            for _ in staying..asked as usize {
                pods.push(Pod { name: names, created: now, ..Pod::default() });
                names += 1;
            }
            // The youngest go first, as they are the least busy.
            let surplus = staying.saturating_sub(asked as usize);
            let stay = pods.iter_mut().rev().filter(|pod| !pod.leaving);
            stay.take(surplus).for_each(|pod| pod.leaving = true);
            for pod in pods.iter_mut().filter(|pod| pod.leaving && pod.in_flight() == 0) {
                pod.done.get_or_insert(at);
            }
            // As the server does: it lingers until somebody has seen its last numbers.
            let ended = |pod: &Pod| {
                pod.done.is_some_and(|done| pod.scraped.back().is_none_or(|(at, ..)| *at > done))
            };
            gone.extend(pods.extract_if(.., |pod| ended(pod)));
            gone.retain(|pod| pod.scraped.back().is_some_and(|(last, ..)| last + 300 > at));
        }
        day
    }

    fn scrape(&mut self, at: usize, now: usize, pods: &mut [Pod], asked: u32, hpa: &Hpa) {
        let time = MIDNIGHT + at;
        for pod in pods.iter_mut().filter(|pod| pod.runs(now)) {
            let (waiting, in_flight) = (pod.waiting.len() as f64, pod.in_flight() as f64);
            pod.scraped.push_back((at, waiting, in_flight));
            if pod.scraped.len() > 5 {
                pod.scraped.pop_front();
            }
            self.pod(time, pod, waiting, in_flight, pod.ready(now));
        }
        let replicas = pods.iter().filter(|pod| !pod.leaving).count() as f64;
        let hpas = [
            ("status_current_replicas", replicas),
            ("status_desired_replicas", f64::from(asked)),
            ("spec_min_replicas", f64::from(hpa.min)),
            ("spec_max_replicas", f64::from(hpa.max)),
        ];
        for (name, value) in hpas {
            let text = self.lines.entry("kube gauge").or_default();
            writeln!(
                text,
                "kube_horizontalpodautoscaler_{name}{{namespace=\"sconce\",\
                 horizontalpodautoscaler=\"keda-hpa-sconce\"}} {value} {time}"
            )
            .unwrap();
        }
    }

    fn pod(&mut self, time: usize, pod: &Pod, waiting: f64, in_flight: f64, ready: bool) {
        let target = format!("namespace=\"sconce\",job=\"sconce\",pod=\"sconce-{}\"", pod.name);
        let model = "model=\"m\"";
        let mut add = |family: &'static str, name: &str, labels: &str, value: f64| {
            let comma = if labels.is_empty() { "" } else { "," };
            let text = self.lines.entry(family).or_default();
            writeln!(text, "{name}{{{target}{comma}{labels}}} {value} {time}").unwrap();
        };
        let c = &pod.counters;
        add("gauge", "up", "", 1.0);
        add("gauge", "sconce_queue_depth", "", waiting);
        add("gauge", "sconce_requests_in_flight", "", in_flight);
        add("gauge", "sconce_queue_work_seconds", "", waiting * WORK as f64 / SEATS as f64);
        add("gauge", "sconce_device_price_usd_per_hour", "", PRICE);
        let state = format!("{model},state=\"ready\"");
        add("gauge", "sconce_model_state", &state, f64::from(u8::from(ready)));
        let ended = format!("{model},task=\"generate\",outcome=\"ok\"");
        add("requests counter", "sconce_requests_total", &ended, c.answered);
        add("within counter", "sconce_requests_within_objective_total", model, c.within);
        add("work counter", "sconce_device_work_seconds_total", model, c.work);
        add("busy counter", "sconce_device_busy_seconds_total", model, c.busy);
        let usd = |seconds: f64| seconds * PRICE / 3600.0;
        let states = [("m", "busy", c.busy), ("m", "load", c.loading), ("", "idle", c.idle)];
        for (model, state, seconds) in states {
            let labels = format!("model=\"{model}\",state=\"{state}\"");
            add("cost counter", "sconce_cost_usd_total", &labels, usd(seconds));
        }
        let (prompt, answer) = TOKENS;
        add("prompt counter", "sconce_prompt_tokens_total", model, prompt * c.answered);
        add("answer counter", "sconce_generated_tokens_total", model, answer * c.answered);
        let labels = format!("{model},task=\"generate\"");
        for (bound, count) in BUCKETS.iter().zip(c.buckets) {
            let labels = format!("{labels},le=\"{bound}.0\"");
            add("duration histogram", "sconce_request_duration_seconds_bucket", &labels, count);
        }
        let infinite = format!("{labels},le=\"+Inf\"");
        add("duration histogram", "sconce_request_duration_seconds_bucket", &infinite, c.answered);
    }

    /// All series of the day, as `promtool` reads them.
    pub(crate) fn open_metrics(&self) -> String {
        let mut text = String::new();
        for lines in self.lines.values() {
            text.push_str(lines);
        }
        text + "# EOF\n"
    }
}

/// What the two questions give at `at`, computed from the same scrapes: the highest queue of a
/// minute and the mean in flight of two, summed over pods.
fn measure<'a>(at: usize, pods: impl Iterator<Item = &'a Pod>) -> [f64; 2] {
    let mut sums = [0.0, 0.0];
    for pod in pods {
        let within =
            |seconds: usize| pod.scraped.iter().filter(move |(time, ..)| time + seconds >= at);
        sums[0] += within(60).map(|(_, waiting, _)| *waiting).fold(0.0, f64::max);
        let in_flight: Vec<f64> = within(120).map(|(.., in_flight)| *in_flight).collect();
        if !in_flight.is_empty() {
            sums[1] += in_flight.iter().sum::<f64>() / in_flight.len() as f64;
        }
    }
    sums
}
