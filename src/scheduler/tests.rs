//! Tests of the scheduler as a whole: one mechanism each.
