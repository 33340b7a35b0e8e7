//! The plan as a document: what `-o json` shows, and what the table and the overlay are made of.
//! Fields are added, never renamed.

use serde::Serialize;

use super::choose::{Placed, Terms, cheapest, place};
use super::compare::Finding;
use super::devices::{Assumptions, Device};
use super::fit::{Fit, Wanted};
use super::load::Load;
use super::pod::Pod;
use super::speed::{Lane, Speed};

/// The whole plan.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    pub(super) schema: u32,
    pub(super) headline: String,
    pub(super) models: Vec<ModelLine>,
    pub(super) groups: Vec<Group>,
    pub(super) totals: Totals,
    /// All models together on each device that was considered, the cheapest first.
    pub(super) together: Vec<Candidate>,
    /// Against a running server, where one was named.
    pub(super) observed: Vec<Finding>,
    pub(super) warnings: Vec<String>,
    pub(super) notes: Vec<String>,
    pub(super) assumptions: Assumptions,
}

/// A model by itself.
#[derive(Debug, Serialize)]
pub(super) struct ModelLine {
    pub(super) name: String,
    pub(super) task: &'static str,
    pub(super) from: &'static str,
    pub(super) format: String,
    pub(super) parameters: u64,
    pub(super) weight_bytes: u64,
    pub(super) kv_bytes_per_token: u64,
    pub(super) load: Load,
}

/// One deployment.
#[derive(Debug, Serialize)]
pub(super) struct Group {
    pub(super) models: Vec<String>,
    pub(super) device: String,
    pub(super) instance: String,
    pub(super) node_devices: u32,
    pub(super) usd_per_hour: f64,
    pub(super) spot_usd_per_hour: Option<f64>,
    pub(super) price_as_of: String,
    pub(super) memory: Fit,
    pub(super) speed: Vec<SpeedLine>,
    /// How many times the asked load a replica carries; none without a load.
    pub(super) carries: Option<f64>,
    pub(super) replicas: u32,
    /// With the one more that spot wants.
    pub(super) replicas_paid: u32,
    pub(super) pod: Pod,
    pub(super) usd_per_month: f64,
    pub(super) spot_usd_per_month: Option<f64>,
    #[serde(skip)]
    pub(super) loads: Vec<Load>,
    #[serde(skip)]
    pub(super) placed: Placed,
}

/// One model's times on its device.
#[derive(Debug, Serialize)]
pub(super) struct SpeedLine {
    pub(super) model: String,
    /// One sequence alone; 0 for encoders.
    pub(super) decode_step_ms: f64,
    pub(super) prefill_ms: f64,
    /// When the replica carries all it can.
    pub(super) full: Option<Lane>,
}

/// The bill.
#[derive(Debug, Serialize)]
pub(super) struct Totals {
    pub(super) devices: u32,
    pub(super) usd_per_month: f64,
    pub(super) spot_usd_per_month: Option<f64>,
    /// If each model had a device of its own, the cheapest that holds it.
    pub(super) alone_devices: Option<u32>,
    pub(super) alone_usd_per_month: Option<f64>,
}

/// All models on one kind of device.
#[derive(Debug, Serialize)]
pub(super) struct Candidate {
    pub(super) device: String,
    pub(super) instance: String,
    pub(super) fits: bool,
    pub(super) why_not: Option<String>,
    pub(super) kv_bytes: u64,
    pub(super) replicas: u32,
    pub(super) usd_per_month: Option<f64>,
    pub(super) spot_usd_per_month: Option<f64>,
}

impl Report {
    pub(super) fn of(
        wanted: &[Wanted<'_>],
        groups: Vec<Placed>,
        devices: &[Device],
        terms: &Terms,
        mut notes: Vec<String>,
    ) -> Self {
        for one in wanted {
            let name = &one.model.name;
            if let Some(refused) = &one.model.refused {
                notes.push(format!("{name}: this version does not serve it: {refused}"));
            } else if one.model.from == "shape" {
                notes.push(format!("{name}: a shape; whether this version serves it is not known"));
            }
        }
        let mut warnings = Vec::new();
        for placed in &groups {
            for warning in &placed.warnings {
                if !warnings.contains(warning) {
                    warnings.push(warning.clone());
                }
            }
        }
        let totals = Totals::of(wanted, &groups, devices, terms);
        let kinds: std::collections::BTreeSet<&str> =
            groups.iter().map(|group| group.device.rented()).collect();
        let kinds: Vec<&str> = kinds.into_iter().collect();
        let headline = totals.headline(wanted.len(), &kinds.join(" + "), terms.spot);
        Self {
            schema: 1,
            headline,
            models: wanted.iter().map(ModelLine::of).collect(),
            groups: groups.into_iter().map(|it| Group::of(wanted, it, terms)).collect(),
            totals,
            together: candidates(wanted, devices, terms),
            observed: Vec::new(),
            warnings,
            notes,
            assumptions: terms.room.assumed.clone(),
        }
    }

    /// Also shows what the models would be like together on `slices`.
    pub(super) fn add_slices(&mut self, wanted: &[Wanted<'_>], slices: &[Device], terms: &Terms) {
        self.together.extend(candidates(wanted, slices, terms));
        sort(&mut self.together);
    }

    pub(super) fn to_json(&self) -> String {
        let mut text = serde_json::to_string_pretty(self).expect("plain data");
        text.push('\n');
        text
    }
}

impl ModelLine {
    fn of(one: &Wanted<'_>) -> Self {
        let model = one.model;
        let kv = model.shape.kv().map_or(0, |kv| kv.token_bytes() as u64);
        Self {
            name: model.name.clone(),
            task: model.task,
            from: model.from,
            format: model.weights.formats.join("+"),
            parameters: model.weights.params,
            weight_bytes: model.weights.total,
            kv_bytes_per_token: kv,
            load: one.load,
        }
    }
}

impl Group {
    fn of(wanted: &[Wanted<'_>], placed: Placed, terms: &Terms) -> Self {
        let members: Vec<Wanted<'_>> = placed.members.iter().map(|it| wanted[*it]).collect();
        let speed = Speed::of(&placed.device, &terms.room.assumed);
        let lanes = placed.point.as_ref().map(|point| &point.lanes);
        let lines = members.iter().enumerate().map(|(index, one)| SpeedLine {
            model: one.model.name.clone(),
            decode_step_ms: match one.model.shape.decoder {
                true => speed.decode(one, 1.0) * 1e3,
                false => 0.0,
            },
            prefill_ms: speed.prefill(one) * 1e3,
            full: lanes.map(|lanes| lanes[index]),
        });
        Self {
            models: members.iter().map(|one| one.model.name.clone()).collect(),
            device: placed.device.name.clone(),
            instance: placed.device.instance.name.clone(),
            node_devices: placed.device.per_node,
            usd_per_hour: placed.device.hourly(false).unwrap_or(0.0),
            spot_usd_per_hour: placed.device.hourly(true),
            price_as_of: placed.device.instance.as_of.clone(),
            memory: placed.fit.clone(),
            speed: lines.collect(),
            carries: placed.point.as_ref().map(|point| point.scale),
            replicas: placed.replicas,
            replicas_paid: placed.paid(terms.spot),
            pod: placed.pod.clone(),
            usd_per_month: placed.on_demand,
            spot_usd_per_month: placed.on_spot,
            loads: members.iter().map(|one| one.load).collect(),
            placed,
        }
    }
}

impl Totals {
    fn of(wanted: &[Wanted<'_>], groups: &[Placed], devices: &[Device], terms: &Terms) -> Self {
        let spot: Option<f64> = groups.iter().map(|group| group.on_spot).sum();
        let alone: Option<Vec<Placed>> =
            (0..wanted.len()).map(|index| cheapest(wanted, &[index], devices, terms)).collect();
        Self {
            devices: groups.iter().map(|group| group.paid(terms.spot)).sum(),
            usd_per_month: groups.iter().map(|group| group.on_demand).sum(),
            spot_usd_per_month: spot,
            alone_devices: alone
                .as_ref()
                .map(|each| each.iter().map(|one| one.paid(terms.spot)).sum()),
            alone_usd_per_month: alone
                .map(|each| each.iter().map(|one| one.cost(terms.spot)).sum()),
        }
    }

    fn headline(&self, models: usize, kinds: &str, spot: bool) -> String {
        let cost = if spot { self.spot_usd_per_month } else { Some(self.usd_per_month) };
        let cost = cost.unwrap_or(self.usd_per_month);
        let terms = if spot { "on spot" } else { "on demand" };
        let this = format!("{} × {kinds}, {cost:.0} USD a month {terms}", self.devices);
        match (self.alone_devices, self.alone_usd_per_month) {
            (Some(devices), Some(alone)) if models > 1 && alone > 0.0 => {
                let less = (1.0 - cost / alone) * 100.0;
                format!(
                    "{models} models, a device each: {devices} devices, {alone:.0} USD a month; \
                     by this plan: {this} ({less:.0} % less)"
                )
            }
            _ => format!("{models} model{}: {this}", if models == 1 { "" } else { "s" }),
        }
    }
}

fn candidates(wanted: &[Wanted<'_>], devices: &[Device], terms: &Terms) -> Vec<Candidate> {
    let all: Vec<usize> = (0..wanted.len()).collect();
    let one = |device: &Device| {
        let placed = place(wanted, &all, device, terms);
        let ok = placed.as_ref().ok();
        Candidate {
            device: device.name.clone(),
            instance: device.instance.name.clone(),
            fits: ok.is_some(),
            why_not: placed.as_ref().err().map(super::choose::Unfit::say),
            kv_bytes: ok.map_or(0, |it| it.fit.kv),
            replicas: ok.map_or(0, |it| it.replicas),
            usd_per_month: ok.map(|it| it.on_demand),
            spot_usd_per_month: ok.and_then(|it| it.on_spot),
        }
    };
    let mut found: Vec<Candidate> = devices.iter().map(one).collect();
    sort(&mut found);
    found
}

/// The cheapest first, what does not fit last.
fn sort(candidates: &mut [Candidate]) {
    let cost = |it: &Candidate| it.usd_per_month.unwrap_or(f64::INFINITY);
    candidates.sort_by(|a, b| cost(a).total_cmp(&cost(b)));
}
