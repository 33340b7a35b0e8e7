//! Who else than a signal can say that this process has to go: one small type a source. Knows no
//! phase; a source may block, it has a thread of its own.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use super::{Lifecycle, Notice, Phase};

/// Somebody who knows that this node or pod is about to go.
pub trait NoticeSource: Send {
    /// For logs and thread names.
    fn name(&self) -> &'static str;

    /// The notice, for as long as it stands. Saying it again changes nothing.
    fn check(&mut self) -> Option<Notice>;
}

/// A file whose appearance means: drain.
#[derive(Debug)]
pub struct FileNotice {
    /// Where it appears.
    pub path: PathBuf,
    /// Time from then on; the configured grace if not given.
    pub within: Option<Duration>,
}

impl NoticeSource for FileNotice {
    fn name(&self) -> &'static str {
        "file"
    }

    fn check(&mut self) -> Option<Notice> {
        let notice = Notice { source: self.name(), within: self.within, terminate: false };
        self.path.exists().then_some(notice)
    }
}

/// Asks `source` again and again until the process is closing.
///
/// # Errors
/// The thread cannot be started.
pub fn watch(
    mut source: impl NoticeSource + 'static,
    every: Duration,
    lifecycle: Arc<Lifecycle>,
) -> std::io::Result<()> {
    let name = format!("notice-{}", source.name());
    let ask = move || {
        while lifecycle.phase() < Phase::Closing {
            if let Some(notice) = source.check() {
                lifecycle.notify(notice);
            }
            std::thread::sleep(every);
        }
    };
    std::thread::Builder::new().name(name).spawn(ask)?;
    Ok(())
}
