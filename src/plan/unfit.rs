//! Why there is no plan: what is short and by how much, what does fit, and the nearest that would.

use std::collections::BTreeMap;

use super::choose::{self, Placed, Terms, Unfit};
use super::devices::{Device, Table};
use super::fit::Wanted;
use super::{Fault, PlanError};

/// Most devices that are named for one model.
const NAMED_MAX: usize = 6;
/// Formats that are tried where a model fits nowhere as it is, the most exact first.
const SMALLER: [&str; 3] = ["q8_0", "q6_k", "q4_0"];

/// For each model that fits on none of `devices` how much is short, and the cheapest device or
/// format that would do.
pub(super) fn explain(
    wanted: &[Wanted<'_>],
    devices: &[Device],
    table: &Table,
    terms: &Terms,
) -> PlanError {
    let everything = known_devices(table);
    let mut lines = vec!["no plan".to_owned()];
    for (index, one) in wanted.iter().enumerate() {
        let Some(mut misses) = misses(wanted, &[index], devices, terms) else { continue };
        let name = &one.model.name;
        let further = misses.split_off(misses.len().min(NAMED_MAX)).len();
        lines.extend(misses.into_iter().map(|miss| format!("{name} on {miss}")));
        if further > 0 {
            lines.push(format!("{further} more kinds of device are further away"));
        }
        match choose::cheapest(wanted, &[index], &everything, terms) {
            Some(it) => lines.push(format!("nearest that fits {name}: {}", bill(&it))),
            None => lines.extend(smaller(one, &everything, terms)),
        }
    }
    if lines.len() == 1 {
        // Each fits alone: it was all on one device that was asked for.
        let all: Vec<usize> = (0..wanted.len()).collect();
        let misses = misses(wanted, &all, devices, terms).unwrap_or_default();
        lines.extend(misses.into_iter().map(|miss| format!("all on {miss}")));
        if let Some(it) = choose::cheapest(wanted, &all, &everything, terms) {
            lines.push(format!("nearest that fits all: {}", bill(&it)));
        }
    } else if let [device, ..] = devices
        && let Some(members) = choose::most_together(wanted, device, terms)
    {
        let names: Vec<&str> = members.iter().map(|it| wanted[*it].model.name.as_str()).collect();
        lines.push(format!("these fit on {}: {}", device.label(), names.join(", ")));
    }
    PlanError::new(Fault::Fit, lines.join("\n  "))
}

/// Why `members` are on none of `devices`, in words: of each kind its largest machine, the least
/// short first. None if they fit on one.
fn misses(
    wanted: &[Wanted<'_>],
    members: &[usize],
    devices: &[Device],
    terms: &Terms,
) -> Option<Vec<String>> {
    let mut kinds: BTreeMap<&str, (u64, String)> = BTreeMap::new();
    for device in devices {
        let unfit = choose::place(wanted, members, device, terms).err()?;
        let short = match &unfit {
            Unfit::Memory(short) => short.need - short.limit,
            Unfit::Node(_) | Unfit::Slow(_) => 0,
        };
        let line = format!("{}: {}", device.label(), why(&unfit));
        let known = kinds.entry(&device.name).or_insert_with(|| (short, line.clone()));
        if short < known.0 {
            *known = (short, line);
        }
    }
    let mut misses: Vec<(u64, String)> = kinds.into_values().collect();
    misses.sort();
    Some(misses.into_iter().map(|(_, line)| line).collect())
}

/// What a model that fits nowhere would need to be.
fn smaller(one: &Wanted<'_>, everything: &[Device], terms: &Terms) -> Vec<String> {
    let name = &one.model.name;
    let mut lines = vec![format!("{name} fits on no single device that is known")];
    for format in SMALLER {
        let Some(model) = one.model.in_format(format) else { continue };
        let smaller = [Wanted { model: &model, load: one.load }];
        if let Some(it) = choose::cheapest(&smaller, &[0], everything, terms) {
            let weights = choose::gib(model.weights.total);
            lines.push(format!("nearest: as {format} ({weights}) on {}", bill(&it)));
        }
    }
    if lines.len() == 1 {
        lines.push("larger hardware can be described in a file of -f".into());
    }
    lines
}

fn why(unfit: &Unfit) -> String {
    match unfit {
        Unfit::Memory(short) => format!(
            "needs {} at the least, {} of it can be used: {} short",
            choose::gib(short.need),
            choose::gib(short.limit),
            choose::gib(short.need - short.limit)
        ),
        other => other.say(),
    }
}

fn bill(placed: &Placed) -> String {
    format!("{}, {:.0} USD a month", placed.device.label(), placed.on_demand)
}

/// Whole devices and slices of everything that is known.
fn known_devices(table: &Table) -> Vec<Device> {
    table.devices(&[], 1).unwrap_or_default().into_iter().chain(table.all_slices()).collect()
}
