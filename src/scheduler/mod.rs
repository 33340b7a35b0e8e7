//! Decides what runs next: one queue over all models, pages and slots, at step granularity.
//! Pure: no device, no clock, no channel, no tokio; `now` is always given in.

pub mod step;

use crate::error::Error;
use crate::request::{Event, LaneId, Micros, Request, RequestId};
use step::{Outcome, SlotId, Step};

/// The scheduler's fixed surroundings.
#[derive(Debug, Clone)]
pub struct SchedulerConfig {
    /// A step should take no longer than this.
    pub step_target: Micros,
    /// Execution slots of the device.
    pub slots: u8,
    /// Uncommitted steps a slot may have.
    pub depth: u8,
    /// Super-pages in the KV region, shared by all lanes.
    pub kv_pages: u32,
}

/// One model's place in the queue.
#[derive(Debug, Clone)]
pub struct LaneConfig {
    /// Share of the device relative to other lanes with work; 1.0 is the default.
    pub weight: f64,
    /// What kind of work.
    pub kind: LaneKind,
    /// Most rows (token positions) in a step: what the workspace was sized for.
    pub rows_max: u32,
    /// First guess of a step's time: fixed part, and part for each row. Learned afterwards.
    pub cost: (Micros, Micros),
}

/// Generating or encoding.
#[derive(Debug, Clone)]
pub enum LaneKind {
    /// Autoregressive, with KV blocks.
    Generate {
        /// Longest sequence, prompt and answer.
        context: u32,
        /// Super-pages in a group: the model's layers.
        layers: u32,
        /// KV blocks that fit one super-page.
        blocks_per_page: u32,
        /// Groups that no other lane can take.
        guaranteed_groups: u32,
        /// Most sequences running at once.
        seats: u32,
    },
    /// Whole inputs, no state.
    Encode,
}

/// What the scheduler holds at one moment; the engine publishes it after every turn.
#[derive(Debug, Clone, Default)]
pub struct Load {
    /// By lane.
    pub lanes: Vec<LaneLoad>,
    /// Arrival of the oldest waiting request.
    pub oldest: Option<Micros>,
    /// Super-pages lent to lanes, used or cached, of the region's total.
    pub kv_pages_lent: u32,
    /// Share of all KV blocks that running sequences hold, 0..1.
    pub kv_usage: f64,
}

/// One lane's part of [`Load`].
#[derive(Debug, Clone, Default)]
pub struct LaneLoad {
    /// Requests waiting for the device, preempted ones included.
    pub waiting: u32,
    /// Prompt tokens waiting.
    pub waiting_tokens: u64,
    /// Predicted device time of what waits.
    pub waiting_work: Micros,
    /// Requests with rows on the device.
    pub running: u32,
    /// KV blocks that running sequences hold.
    pub blocks_used: u32,
    /// KV blocks that only the prefix cache holds.
    pub blocks_cached: u32,
    /// Preemptions since start.
    pub preemptions: u64,
}

/// One event for one request.
pub type Said = (RequestId, Event);

/// The device queue.
#[derive(Debug)]
pub struct Scheduler {}

#[expect(unused_variables, reason = "skeleton")]
impl Scheduler {
    /// An empty queue over `lanes`; `LaneId` is the index.
    pub fn new(config: SchedulerConfig, lanes: Vec<LaneConfig>) -> Self {
        Self {}
    }

    /// Takes a request into its lane's waiting list.
    pub fn admit(&mut self, request: Request) {}

    /// Forgets a request: nothing more is said about it. In-flight rows are discarded at commit.
    pub fn cancel(&mut self, id: RequestId) {}

    /// Ends every request with `error`: the drain's last act, or a dead device.
    pub fn fail_all(&mut self, error: &Error, said: &mut Vec<Said>) {}

    /// Fills `step` with the next work for `slot`; false when there is none now. Requests whose
    /// deadline passed while waiting are failed into `said`.
    pub fn plan(
        &mut self,
        now: Micros,
        slot: SlotId,
        step: &mut Step,
        said: &mut Vec<Said>,
    ) -> bool {
        false
    }

    /// Takes in what a step gave, in dispatch order within a slot.
    pub fn commit(&mut self, now: Micros, step: &Step, outcome: &Outcome, said: &mut Vec<Said>) {}

    /// Takes in that a step failed: its requests end with `error`, the lane goes on.
    pub fn abandon(&mut self, step: &Step, error: &Error, said: &mut Vec<Said>) {}

    /// Whether any request is waiting, running or in flight.
    pub fn is_idle(&self) -> bool {
        true
    }

    /// What is held now, written into `load` without allocating once it has its size.
    pub fn load(&self, load: &mut Load) {}
}

/// Names a lane in a log line.
impl std::fmt::Display for LaneId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.0)
    }
}
