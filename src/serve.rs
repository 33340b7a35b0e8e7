//! `sconce serve`: the composition root. The only file that sees core, device and front.

/// Serves until told to stop.
///
/// # Errors
/// What kept it from starting.
#[expect(unused_variables, reason = "skeleton")]
pub fn run(config: crate::config::Config) -> anyhow::Result<std::process::ExitCode> {
    anyhow::bail!("serving is not built yet")
}
