//! Places in the device's token buffer: one for each generation on the device. Knows lanes only
//! as indices.

use super::step::{Seat, TRIAL_SEAT};

/// Lends seats to lanes, each up to its own limit.
///
/// The last free seats are kept for lanes that hold none, so that a lane always gets one.
#[derive(Debug)]
pub(super) struct Seats {
    free: Vec<u32>,
    lanes: Vec<Holder>,
    /// Lanes that may hold seats and hold none.
    seatless: usize,
}

#[derive(Debug)]
struct Holder {
    held: u32,
    limit: u32,
}

impl Seats {
    /// `limits` by lane; 0 for a lane that needs none.
    pub(super) fn new(limits: impl Iterator<Item = u32>) -> Self {
        let lanes: Vec<Holder> = limits.map(|limit| Holder { held: 0, limit }).collect();
        let seatless = lanes.iter().filter(|holder| holder.limit > 0).count();
        let seats = TRIAL_SEAT.0;
        assert!(seatless <= seats as usize, "{seatless} generating lanes, {seats} seats");
        Self { free: (0..seats).rev().collect(), lanes, seatless }
    }

    /// Whether the lane could get a seat now.
    pub(super) fn available(&self, lane: usize) -> bool {
        let Holder { held, limit } = self.lanes[lane];
        held < limit && (held == 0 || self.free.len() > self.seatless)
    }

    /// How many seats the lane could get now, if no other lane took any.
    pub(super) fn left(&self, lane: usize) -> u32 {
        let Holder { held, limit } = self.lanes[lane];
        let free = self.free.len() + usize::from(held == 0) - self.seatless;
        (limit - held).min(free as u32)
    }

    /// A seat, if one is available.
    pub(super) fn take(&mut self, lane: usize) -> Option<Seat> {
        if !self.available(lane) {
            return None;
        }
        let holder = &mut self.lanes[lane];
        self.seatless -= usize::from(holder.held == 0);
        holder.held += 1;
        Some(Seat(self.free.pop().expect("a seat is kept for every lane without one")))
    }

    /// Takes a seat back.
    pub(super) fn put_back(&mut self, lane: usize, seat: Seat) {
        let holder = &mut self.lanes[lane];
        assert!(holder.held > 0, "lane {lane} returns a seat it does not hold");
        holder.held -= 1;
        self.seatless += usize::from(holder.held == 0);
        self.free.push(seat.0);
    }

    /// How many seats the lane holds.
    #[cfg(test)]
    pub(super) fn held(&self, lane: usize) -> u32 {
        self.lanes[lane].held
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_seats_are_kept_for_lanes_without_one() {
        let most = TRIAL_SEAT.0;
        let mut seats = Seats::new([most, 4, 0].into_iter());
        let mut taken = Vec::new();
        while let Some(seat) = seats.take(0) {
            assert!(seat != TRIAL_SEAT);
            taken.push(seat);
        }
        assert_eq!(taken.len() as u32, most - 1);
        let other = seats.take(1).expect("kept");
        assert!(seats.take(1).is_none() && seats.take(2).is_none());
        seats.put_back(0, taken.pop().unwrap());
        assert!(seats.take(0).is_some());
        seats.put_back(1, other);
        assert!(seats.take(0).is_none() && seats.take(1).is_some());
        assert_eq!((seats.left(0), seats.left(1), seats.left(2)), (0, 0, 0));
    }
}
