//! What must hold between any two calls, checked by the tests: every page, block and seat is in
//! exactly one place, and the sums agree with what they count.

use std::collections::HashMap;

use super::Scheduler;
use super::lane::Work;
use super::sequence::State;
use super::step::BlockId;

impl Scheduler {
    /// Panics if the books do not balance.
    pub(super) fn check(&self) {
        for (number, lane) in self.lanes.iter().enumerate() {
            let mut holders: HashMap<BlockId, u32> = HashMap::new();
            let mut seats = 0;
            if let Work::Generate(lane) = &lane.work {
                let (mut tokens, mut new, mut waiting, mut running, mut leaving) = (0, 0, 0, 0, 0);
                for index in lane.sequences.indices() {
                    let sequence = &lane.sequences[index];
                    seats += u32::from(sequence.seat.is_some());
                    leaving += u32::from(sequence.leaving);
                    for block in sequence.blocks.iter().chain(&sequence.source) {
                        *holders.entry(*block).or_default() += 1;
                    }
                    match sequence.state {
                        State::Waiting => {
                            waiting += 1;
                            tokens += u64::from(sequence.known());
                            new += u64::from(sequence.remaining());
                            assert!(sequence.blocks.is_empty() && sequence.seat.is_none());
                            assert!(sequence.source.is_none());
                        }
                        State::Running => running += 1,
                        State::Finished | State::Dropped => assert!(sequence.in_flight > 0),
                    }
                }
                assert_eq!(lane.waiting.len(), waiting);
                assert_eq!(lane.running.len(), running);
                assert_eq!(lane.leaving, leaving);
                assert_eq!((lane.waiting_tokens, lane.waiting_new), (tokens, new));
                let age = |&index: &u32| lane.sequences[index].age;
                assert!(lane.waiting.iter().is_sorted_by_key(age));
                assert!(lane.running.iter().is_sorted_by_key(age));
            }
            assert_eq!(self.seats.held(number), seats, "seats of lane {number}");
            self.pages.blocks(number).check(&holders);
        }
        self.pages.check();
        let in_flight: usize = self.flights.iter().map(|slot| slot.len()).sum();
        assert_eq!(in_flight, self.lanes.iter().map(|lane| lane.in_flight).sum::<usize>());
    }

    /// After a `plan` that found nothing: whoever waits with nothing on the device has no claim
    /// left on pages that another lane keeps above its guarantee.
    pub(super) fn check_guarantees(&self) {
        for (number, lane) in self.lanes.iter().enumerate() {
            let Work::Generate(work) = &lane.work else { continue };
            if let Some(&head) = work.waiting.front()
                && work.running.is_empty()
                && lane.in_flight == 0
            {
                let blocks = work.sequences[head].blocks_for_text();
                assert_eq!(self.pages.lacking(number, blocks), 0, "lane {number} lacks pages");
            }
        }
    }

    /// Groups that each lane has and is guaranteed, and whether it has work.
    pub(super) fn loans(&self) -> Vec<(u32, u32, bool)> {
        (0..self.lanes.len()).map(|number| self.pages.loan(number)).collect()
    }
}
