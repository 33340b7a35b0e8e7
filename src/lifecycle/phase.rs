//! The phase machine: what a notice, an ending request or the passing of time does to the
//! process. Pure: knows no clock, no tokio and nobody who follows it.

use super::Phase;
use crate::request::Micros;

/// What can happen to the process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// Every model that the server waits for is warm.
    ModelsReady,
    /// Somebody says that it has to go.
    Told {
        /// Time until it will be gone.
        within: Micros,
        /// It may exit, because whoever said this does not start it again (SIGTERM).
        terminate: bool,
        /// A person at a terminal (SIGINT): no endpoint has to learn of it first.
        at_once: bool,
    },
    /// The engine is dead.
    EngineFailed,
    /// Time has passed or a request ended; this many are in flight.
    Look {
        /// Requests accepted and not fully answered.
        in_flight: usize,
    },
}

/// How a grace is split: lame duck, then draining, then the margin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Budget {
    /// Still admitting, because endpoints and proxies need time to learn.
    pub lame_duck: Micros,
    /// Kept for cutting what is left and for last words.
    pub margin: Micros,
}

/// Where the process stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Life {
    /// The phase.
    pub phase: Phase,
    /// When it will be gone. Comes nearer, never moves away.
    pub deadline: Option<Micros>,
    /// Whether it may exit before the deadline.
    pub terminate: bool,
    /// Whether the engine died.
    pub failed: bool,
    /// The margin that the deadline was given with.
    margin: Micros,
    /// When the lame duck ends.
    duck_ends: Micros,
    /// When closing ends at the latest.
    closing_ends: Micros,
}

impl Budget {
    /// Splits `grace`: margin = clamp(0.1 G, 1, 5) s, lame duck =
    /// clamp(0.2 G, 2, 10) s; of a very short grace no more than a half and a third.
    pub fn of(grace: Micros) -> Self {
        const SECOND: u64 = 1_000_000;
        let part = |tenths: u64, least: u64, most: u64| {
            (grace.0 / 10 * tenths).clamp(least * SECOND, most * SECOND)
        };
        Self {
            lame_duck: Micros(part(2, 2, 10).min(grace.0 / 3)),
            margin: Micros(part(1, 1, 5).min(grace.0 / 2)),
        }
    }
}

impl Default for Life {
    fn default() -> Self {
        Self {
            phase: Phase::Loading,
            deadline: None,
            terminate: false,
            failed: false,
            margin: Micros(0),
            duck_ends: Micros(0),
            closing_ends: Micros(0),
        }
    }
}

impl Life {
    /// What `event` makes of it: at most one phase further.
    #[must_use]
    pub fn next(mut self, event: Event, now: Micros) -> Life {
        match event {
            Event::ModelsReady if self.phase == Phase::Loading => self.phase = Phase::Ready,
            Event::ModelsReady => {}
            Event::Told { within, terminate, at_once } => {
                let again = self.terminate && terminate;
                self.terminate |= terminate;
                self.approach(now.plus(within), now);
                self.told(again, at_once, now);
            }
            Event::EngineFailed => {
                self.failed = self.failed || self.phase < Phase::Stopped;
                self.approach(now.plus(Micros(FAILED_GRACE)), now);
                self.close(now);
            }
            Event::Look { in_flight } => self.look(in_flight, now),
        }
        self
    }

    /// When time alone may change something, if it can.
    pub fn wake(&self) -> Option<Micros> {
        let deadline = self.deadline?;
        match self.phase {
            Phase::Loading | Phase::Ready | Phase::Stopped => None,
            Phase::LameDuck => Some(self.duck_ends),
            Phase::Draining => Some(deadline.since(self.margin)),
            Phase::Drained => Some(deadline),
            Phase::Closing => Some(self.closing_ends),
        }
    }

    /// Time kept before the deadline to log and to exit: a fifth of the margin.
    pub fn last_words(&self) -> Micros {
        Micros(self.margin.0 / 5)
    }

    /// When those that are still in flight in `Closing` are to be told that they are cut, whatever
    /// the engine does: as long before its end as last words take.
    pub fn last_call(&self) -> Micros {
        self.closing_ends.since(self.last_words())
    }

    /// Brings the deadline to `until` if that is nearer, and the split with it.
    fn approach(&mut self, until: Micros, now: Micros) {
        if self.deadline.is_some_and(|deadline| deadline <= until) {
            return;
        }
        let budget = Budget::of(until.since(now));
        self.deadline = Some(until);
        self.margin = budget.margin;
        let duck_ends = now.plus(budget.lame_duck);
        let begun = self.phase == Phase::LameDuck;
        self.duck_ends = if begun { self.duck_ends.min(duck_ends) } else { duck_ends };
    }

    /// Takes in a notice; `again` if it is not the first that allows to exit.
    fn told(&mut self, again: bool, at_once: bool, now: Micros) {
        match self.phase {
            Phase::Loading if self.terminate => self.close(now),
            // Nothing was admitted and nothing will be, but exiting would start us again.
            Phase::Loading => self.phase = Phase::Draining,
            Phase::Ready if at_once => self.phase = Phase::Draining,
            Phase::Ready => self.phase = Phase::LameDuck,
            Phase::LameDuck | Phase::Draining if again => self.close(now),
            Phase::LameDuck if at_once => self.phase = Phase::Draining,
            Phase::Drained if self.terminate => self.close(now),
            _ => {}
        }
    }

    fn look(&mut self, in_flight: usize, now: Micros) {
        let due = self.wake().is_some_and(|wake| now >= wake);
        match self.phase {
            Phase::LameDuck if due => self.phase = Phase::Draining,
            Phase::Draining if in_flight == 0 && !self.terminate => self.phase = Phase::Drained,
            Phase::Draining if in_flight == 0 || due => self.close(now),
            Phase::Drained if due => self.close(now),
            Phase::Closing if in_flight == 0 || due => self.phase = Phase::Stopped,
            _ => {}
        }
    }

    /// Closing takes at most the margin less the last words: the kubelet's clock started a little
    /// before ours.
    fn close(&mut self, now: Micros) {
        if self.phase < Phase::Closing {
            self.phase = Phase::Closing;
            self.closing_ends = now.plus(self.margin.since(self.last_words()));
        }
    }
}

/// A dead engine ends the process within seconds, whatever grace it would have had; a last scrape
/// and the last bytes of answers included, it stays below five.
const FAILED_GRACE: u64 = 3_000_000;

#[cfg(test)]
mod tests {
    use super::*;

    const S: u64 = 1_000_000;
    const TERM: Event = Event::Told { within: Micros(30 * S), terminate: true, at_once: false };
    const INT: Event = Event::Told { within: Micros(30 * S), terminate: true, at_once: true };
    const NOTICE: Event = Event::Told { within: Micros(30 * S), terminate: false, at_once: false };

    fn at(seconds: f64) -> Micros {
        Micros((seconds * S as f64) as u64)
    }

    /// A life that came into `phase` at time 0 by the events it takes; `terminate` if by SIGTERM.
    fn life(phase: Phase, terminate: bool) -> Life {
        let told = if terminate { TERM } else { NOTICE };
        let look = |in_flight| Event::Look { in_flight };
        let now = Micros(0);
        let ready = Life::default().next(Event::ModelsReady, now);
        let duck = ready.next(told, now);
        let draining = duck.next(look(1), at(6.0));
        match phase {
            Phase::Loading => Life::default(),
            Phase::Ready => ready,
            Phase::LameDuck => duck,
            Phase::Draining => draining,
            Phase::Drained => {
                let quiet = ready.next(NOTICE, now).next(look(0), at(6.0)).next(look(0), at(6.0));
                assert_eq!(quiet.phase, Phase::Drained);
                quiet
            }
            Phase::Closing => draining.next(look(1), at(27.0)),
            Phase::Stopped => draining.next(look(1), at(27.0)).next(look(0), at(27.0)),
        }
    }

    /// Every phase and every event, the time right after the phase was entered.
    #[test]
    fn table() {
        use Phase::*;
        let idle = Event::Look { in_flight: 0 };
        let busy = Event::Look { in_flight: 1 };
        let failed = Event::EngineFailed;
        let events = [Event::ModelsReady, TERM, INT, NOTICE, failed, idle, busy];
        #[rustfmt::skip]
        let table = [
            // by SIGTERM    models   SIGTERM   SIGINT    notice    failed   idle      busy
            (Loading, true,  [Ready,  Closing,  Closing,  Draining, Closing, Loading,  Loading]),
            (Ready, true,    [Ready,  LameDuck, Draining, LameDuck, Closing, Ready,    Ready]),
            (LameDuck, true, [LameDuck, Closing, Closing, LameDuck, Closing, LameDuck, LameDuck]),
            (Draining, true, [Draining, Closing, Closing, Draining, Closing, Closing,  Draining]),
            (Closing, true,  [Closing, Closing, Closing,  Closing,  Closing, Stopped,  Closing]),
            (Stopped, true,  [Stopped, Stopped, Stopped,  Stopped,  Stopped, Stopped,  Stopped]),
            // by a notice
            (LameDuck, false,
                [LameDuck, LameDuck, Draining, LameDuck, Closing, LameDuck, LameDuck]),
            (Draining, false, [Draining, Draining, Draining, Draining, Closing, Drained, Draining]),
            (Drained, false,  [Drained, Closing, Closing, Drained, Closing, Drained, Drained]),
            (Closing, false,  [Closing, Closing, Closing, Closing, Closing, Stopped, Closing]),
        ];
        for (phase, terminate, expected) in table {
            let begun = life(phase, terminate);
            assert_eq!(begun.phase, phase);
            let now = match phase {
                Closing | Stopped => at(27.0),
                Draining | Drained => at(6.0),
                _ => Micros(0),
            };
            for (event, expected) in events.into_iter().zip(expected) {
                let next = begun.next(event, now);
                assert_eq!(next.phase, expected, "{phase:?} (terminate {terminate}) + {event:?}");
                assert!(next.phase >= phase, "forward only");
            }
        }
    }

    /// The documented examples: 15 → 3 / 10.5 / 1.5, 30 → 6 / 21 / 3, 120 → 10 / 105 / 5.
    #[test]
    fn budgets() {
        for (grace, lame_duck, drain, margin) in
            [(15.0, 3.0, 10.5, 1.5), (30.0, 6.0, 21.0, 3.0), (120.0, 10.0, 105.0, 5.0)]
        {
            let budget = Budget::of(at(grace));
            assert_eq!(budget, Budget { lame_duck: at(lame_duck), margin: at(margin) });
            assert_eq!(grace - lame_duck - margin, drain);
        }
        for grace in (0..5_000).map(|millis| Micros(millis * 1_000)) {
            let Budget { lame_duck, margin } = Budget::of(grace);
            assert!(lame_duck.0 + margin.0 <= grace.0, "{grace:?} leaves time to drain");
        }
    }

    #[test]
    fn time_alone_walks_through_a_drain() {
        let busy = Event::Look { in_flight: 1 };
        let mut life = life(Phase::LameDuck, true);
        for (seconds, phase) in [
            (5.9, Phase::LameDuck),
            (6.0, Phase::Draining),
            (26.9, Phase::Draining),
            (27.0, Phase::Closing),
            (29.3, Phase::Closing),
            (29.4, Phase::Stopped),
        ] {
            life = life.next(busy, at(seconds));
            assert_eq!(life.phase, phase, "{seconds}");
            assert!(life.wake().is_none_or(|wake| wake > at(seconds)), "no busy waiting");
        }
    }

    #[test]
    fn a_later_notice_only_brings_the_deadline_nearer() {
        let within = |seconds: u64, terminate| Event::Told {
            within: Micros(seconds * S),
            terminate,
            at_once: false,
        };
        let ready = Life::default().next(Event::ModelsReady, Micros(0));
        let far = ready.next(within(120, false), Micros(0));
        assert_eq!((far.deadline, far.wake()), (Some(at(120.0)), Some(at(10.0))));
        let farther = far.next(within(300, false), at(1.0));
        assert_eq!(farther, far);
        // SIGTERM with 30 s: nearer, and the lame duck that has begun is not made longer.
        let nearer = far.next(within(30, true), at(5.0));
        assert_eq!((nearer.deadline, nearer.wake()), (Some(at(35.0)), Some(at(10.0))));
        assert!(nearer.terminate && nearer.phase == Phase::LameDuck);
        // Very near: the lame duck gets shorter.
        let near = far.next(within(3, false), at(1.0));
        assert_eq!((near.deadline, near.wake()), (Some(at(4.0)), Some(at(2.0))));
        // In Draining the margin is the new deadline's.
        let draining = far.next(Event::Look { in_flight: 1 }, at(10.0));
        assert_eq!(draining.wake(), Some(at(115.0)));
        assert_eq!(draining.next(within(30, true), at(10.0)).wake(), Some(at(37.0)));
        // In Drained the deadline itself ends the wait.
        let drained = draining.next(Event::Look { in_flight: 0 }, at(11.0));
        assert_eq!((drained.phase, drained.wake()), (Phase::Drained, Some(at(120.0))));
        let ended = drained.next(Event::Look { in_flight: 0 }, at(120.0));
        assert_eq!(ended.phase, Phase::Closing);
    }

    #[test]
    fn a_dead_engine_leaves_seconds() {
        let failed = life(Phase::Ready, false).next(Event::EngineFailed, at(50.0));
        assert!(failed.failed && failed.phase == Phase::Closing);
        assert_eq!(failed.last_call(), at(50.6));
        assert_eq!((failed.deadline, failed.wake()), (Some(at(53.0)), Some(at(50.8))));
        let stopped = life(Phase::Stopped, true).next(Event::EngineFailed, at(50.0));
        assert!(!stopped.failed, "too late to matter");
    }
}
