//! What the scheduler does when something is wrong with a lane: a step that found no memory is put
//! back, a lane that fails is emptied, and one that comes late says what its steps cost.

use super::cost_model::CostModel;
use super::lane::Work;
use super::step::Step;
use super::{Said, Scheduler};
use crate::error::Error;
use crate::request::{LaneId, Micros};

impl Scheduler {
    /// Takes in that there was no memory for a step: its requests wait again, nothing of what they
    /// were told changes, and the lane's next steps are smaller. The grants it carried are
    /// announced again.
    pub fn put_back(&mut self, step: &Step, said: &mut Vec<Said>) {
        let flight = self.land(step);
        for grant in &step.grants {
            self.pages.grant_again(flight.lane, grant.group);
        }
        self.queue.measured(flight.lane, flight.predicted, Micros(0));
        self.lanes[flight.lane].allowed = (step.rows() as u32 / 2).max(1);
        let members = &flight.members;
        self.conclude(flight.lane, said, |lane, turn| match &mut lane.work {
            Work::Generate(lane) => lane.put_back(&step.spans, members, turn),
            Work::Encode(lane) => lane.put_back(&step.spans, members, turn),
        });
        self.spare_members.push(flight.members);
    }

    /// Ends every request of one lane with `error`.
    pub fn fail_lane(&mut self, lane: LaneId, error: &Error, said: &mut Vec<Said>) {
        self.conclude(usize::from(lane.0), said, |lane, turn| match &mut lane.work {
            Work::Generate(lane) => lane.fail_all(error, turn),
            Work::Encode(lane) => lane.fail_all(error, turn),
        });
    }

    /// What a step of a lane costs, fixed and for each row, measured before it served anybody.
    pub fn set_cost(&mut self, lane: LaneId, cost: (Micros, Micros)) {
        let target = self.config.step_target;
        let lane = &mut self.lanes[usize::from(lane.0)];
        lane.cost = CostModel::new(cost, lane.rows_max, target);
    }
}
