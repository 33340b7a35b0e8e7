//! The proof: thousands of seeded worlds of random lanes, requests, cancellations, failures and
//! step times on a virtual clock, against a device whose text shows every mistake in the books.
//! `SCONCE_SIM_SEEDS` sets how many worlds, `SCONCE_SIM_FIRST` the first seed.

mod client;
mod device;
pub(super) mod rng;
mod world;

use super::sim::rng::Rng;
use super::sim::world::{Fate, World};

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().expect("a number"))
}

#[test]
fn every_request_ends_once_with_the_text_it_has_alone() {
    let first = setting("SCONCE_SIM_FIRST", 0);
    let mut total = Fate::default();
    for seed in first..first + setting("SCONCE_SIM_SEEDS", 3000) {
        let fate = std::panic::catch_unwind(|| World::new(seed).run());
        total.add(&fate.unwrap_or_else(|cause| {
            eprintln!("simulation failed at seed {seed}");
            std::panic::resume_unwind(cause)
        }));
    }
    eprintln!("{total:?}");
    // A world in which nothing happens proves nothing.
    total.assert_everything_happened();
}

/// Two lanes with endless work share one slot: device time / weight never drifts apart.
#[test]
fn backlogged_lanes_share_device_time_by_weight() {
    for seed in 0..40 {
        let mut rng = Rng(seed);
        let depth = rng.within(1, 2) as u8;
        let weights = [rng.within(1, 4) as f64, rng.within(1, 4) as f64];
        let world = World::backlogged(&mut rng, depth, weights);
        let (used, longest) = world.run_backlogged(600);
        for at in used {
            let shares = [at[0] / weights[0], at[1] / weights[1]];
            let bound =
                f64::from(2 + u32::from(depth)) * longest * 2.0 / weights[0].min(weights[1]);
            let drift = (shares[0] - shares[1]).abs();
            assert!(drift <= bound, "seed {seed}: {shares:?} differ by more than {bound}");
        }
    }
}
