//! One binary for all integration tests: a large link is paid once.

mod tidy;
