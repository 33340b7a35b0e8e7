//! Which models go together on which devices, how many of them, and what that costs: the cheapest
//! plan that meets every objective.

use std::collections::BTreeMap;

use super::devices::Device;
use super::fit::{Fit, Room, Short, Wanted};
use super::pod::{ByHand, Pod, part_of_node};
use super::speed::{Point, Speed};

/// Most models whose groupings are all tried; more are planned together.
pub(super) const GROUPED_MAX: usize = 10;

/// What decides between devices.
#[derive(Debug, Clone)]
pub(super) struct Terms {
    pub(super) room: Room,
    pub(super) by_hand: ByHand,
    /// Compare spot prices.
    pub(super) spot: bool,
}

/// Models on a device.
#[derive(Debug, Clone)]
pub(super) struct Placed {
    /// Indices of the models.
    pub(super) members: Vec<usize>,
    pub(super) device: Device,
    pub(super) fit: Fit,
    pub(super) point: Option<Point>,
    pub(super) replicas: u32,
    pub(super) pod: Pod,
    pub(super) warnings: Vec<String>,
    /// Dollars a month for all replicas.
    pub(super) on_demand: f64,
    /// With one replica more, since one may be gone; none without a spot price.
    pub(super) on_spot: Option<f64>,
}

/// Why models cannot be on a device.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Unfit {
    /// Device memory.
    Memory(Short),
    /// The node's memory or processors, in words.
    Node(String),
    /// An objective, in words.
    Slow(String),
}

impl Placed {
    /// Dollars a month as they are compared.
    pub(super) fn cost(&self, spot: bool) -> f64 {
        match spot {
            true => self.on_spot.unwrap_or(f64::INFINITY),
            false => self.on_demand,
        }
    }

    /// Replicas as they are paid for.
    pub(super) fn paid(&self, spot: bool) -> u32 {
        self.replicas + u32::from(spot)
    }
}

impl Unfit {
    /// For people.
    pub(super) fn say(&self) -> String {
        match self {
            Unfit::Memory(short) => format!("{} short", gib(short.need - short.limit)),
            Unfit::Node(what) | Unfit::Slow(what) => what.clone(),
        }
    }
}

/// Bytes as GiB, for people.
pub(super) fn gib(bytes: u64) -> String {
    format!("{:.2} GiB", bytes as f64 / f64::from(1 << 30))
}

/// Puts the models `members` of `all` on `device`.
///
/// # Errors
/// Why they cannot be there.
pub(super) fn place(
    all: &[Wanted<'_>],
    members: &[usize],
    device: &Device,
    terms: &Terms,
) -> Result<Placed, Unfit> {
    let wanted: Vec<Wanted<'_>> = members.iter().map(|index| all[*index]).collect();
    let room = &terms.room;
    let fit = Fit::of(&wanted, device, room).map_err(Unfit::Memory)?;
    let speed = Speed::of(device, &room.assumed);
    if let Some(what) =
        speed.too_slow(&wanted, (room.assumed.p95_generate, room.assumed.p95_encode))
    {
        return Err(Unfit::Slow(what));
    }
    let point = speed.capacity(&wanted, &fit);
    let loaded = wanted.iter().any(|one| one.load.rps > 0.0);
    if loaded && point.is_none() {
        return Err(Unfit::Slow("the objectives cannot be met together".into()));
    }
    let part = |point: &Point| (1.0 / (room.assumed.load_target * point.scale)).ceil();
    let replicas = point.as_ref().map_or(1, |point| (part(point) as u32).max(1));
    let work = (wanted.as_slice(), &fit);
    let paid = replicas + u32::from(terms.spot);
    let pod = Pod::of(work, device, room, (point.as_ref(), paid), &terms.by_hand);
    let (_, memory_most) = part_of_node(device, room);
    if pod.memory > memory_most && terms.by_hand.memory.is_none() {
        let what = format!(
            "the pod needs {} of host memory, the node has {} for it",
            gib(pod.memory),
            gib(memory_most)
        );
        return Err(Unfit::Node(what));
    }
    let warnings = pod.warnings(work, device, room, (point.as_ref(), &terms.by_hand));
    let month = |spot: bool| {
        let count = f64::from(replicas + u32::from(spot));
        Some(device.hourly(spot)? * count * room.assumed.hours)
    };
    Ok(Placed {
        members: members.to_vec(),
        on_demand: month(false).unwrap_or(f64::INFINITY),
        on_spot: month(true),
        device: device.clone(),
        fit,
        point,
        replicas,
        pod,
        warnings,
    })
}

/// The cheapest of `devices` for the models `members`.
pub(super) fn cheapest(
    all: &[Wanted<'_>],
    members: &[usize],
    devices: &[Device],
    terms: &Terms,
) -> Option<Placed> {
    let placed = devices.iter().filter_map(|device| place(all, members, device, terms).ok());
    let placed = placed.filter(|it| it.cost(terms.spot).is_finite());
    placed.min_by(|a, b| a.cost(terms.spot).total_cmp(&b.cost(terms.spot)))
}

/// The cheapest way to put all models on devices: every grouping is tried. None if a model fits
/// nowhere.
pub(super) fn group(
    all: &[Wanted<'_>],
    devices: &[Device],
    terms: &Terms,
    together: bool,
) -> Option<Vec<Placed>> {
    let count = all.len();
    let everyone: Vec<usize> = (0..count).collect();
    if together || count > GROUPED_MAX {
        return Some(vec![cheapest(all, &everyone, devices, terms)?]);
    }
    let members = |set: u32| -> Vec<usize> {
        everyone.iter().copied().filter(|index| set & (1 << index) != 0).collect()
    };
    let mut alone: BTreeMap<u32, Option<Placed>> = BTreeMap::new();
    for set in 1..1_u32 << count {
        alone.insert(set, cheapest(all, &members(set), devices, terms));
    }
    // The best for a set: some group with its first model, and the best for the rest.
    let mut best: BTreeMap<u32, (f64, Vec<u32>)> = BTreeMap::from([(0, (0.0, Vec::new()))]);
    for set in 1..1_u32 << count {
        let first = set & set.wrapping_neg();
        let mut found: Option<(f64, Vec<u32>)> = None;
        let mut part = set;
        while part != 0 {
            if part & first != 0
                && let (Some(Some(placed)), Some((rest, groups))) =
                    (alone.get(&part), best.get(&(set ^ part)))
            {
                let cost = placed.cost(terms.spot) + rest;
                // Larger groups come first: at equal cost, fewer pods.
                if found.as_ref().is_none_or(|(least, _)| cost < *least) {
                    let groups = [part].into_iter().chain(groups.iter().copied());
                    found = Some((cost, groups.collect()));
                }
            }
            part = (part - 1) & set;
        }
        if let Some(found) = found {
            best.insert(set, found);
        }
    }
    let (_, groups) = best.remove(&((1 << count) - 1))?;
    let placed = groups.iter().filter_map(|set| alone.remove(set).flatten());
    Some(placed.collect())
}

/// The most models that fit on `device` together, of several such sets the one with the largest
/// weights.
pub(super) fn most_together(
    all: &[Wanted<'_>],
    device: &Device,
    terms: &Terms,
) -> Option<Vec<usize>> {
    if all.len() > GROUPED_MAX {
        return None;
    }
    let sets = (1..1_u32 << all.len()).map(|set| -> Vec<usize> {
        (0..all.len()).filter(|index| set & (1 << index) != 0).collect()
    });
    let fitting = sets.filter(|members| place(all, members, device, terms).is_ok());
    let weights =
        |members: &[usize]| members.iter().map(|it| all[*it].model.weights.total).sum::<u64>();
    fitting.max_by_key(|members| (members.len(), weights(members)))
}
