//! The device thread: admit, plan, run, commit; block on the inbox when there is nothing to plan.

pub mod runner;
