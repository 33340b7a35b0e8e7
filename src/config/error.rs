//! A configuration that cannot be used: one line that names the culprit, and the exit code that
//! scripts tell apart.

/// What is wrong, where, what is allowed and what to do, in one line.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct ConfigError {
    fault: Fault,
    message: String,
}

/// The kinds of bad input, by what a person has to change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The command line.
    Usage,
    /// A file that was asked for does not exist or cannot be read.
    NoInput,
    /// A folder cannot be created.
    CannotCreate,
    /// The environment, sconce.toml or a manifest.
    Config,
}

impl ConfigError {
    /// An error of `fault`; line breaks in `message` become spaces.
    pub(super) fn new(fault: Fault, message: impl AsRef<str>) -> Self {
        let message = message.as_ref().split('\n').map(str::trim).collect::<Vec<_>>().join(" ");
        Self { fault, message }
    }

    /// What a person has to change.
    pub fn fault(&self) -> Fault {
        self.fault
    }

    /// The process's exit code, from sysexits.h.
    pub fn exit_code(&self) -> u8 {
        match self.fault {
            Fault::Usage => 64,
            Fault::NoInput => 66,
            Fault::CannotCreate => 73,
            Fault::Config => 78,
        }
    }
}
