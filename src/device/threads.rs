//! One team of threads that runs a job in lockstep: every member walks the same list, claims
//! chunks of each entry, and meets the others at a barrier after it. Knows nothing of what is
//! computed.
//!
//! Members that wait spin for some microseconds and then sleep: a barrier that only spins keeps a
//! hundredth of its speed beside two busy neighbours on two cores, one that sleeps nearly half
//! (2 Zen 4 cores, 2026-11). An idle team uses no processor time.

#![allow(unsafe_code)]

use std::any::Any;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long a member spins before it sleeps, at a barrier and between jobs.
const SPIN: Duration = Duration::from_micros(40);

/// A team: the caller of [`Team::run`] and `threads - 1` workers.
#[derive(Debug)]
pub struct Team {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
}

/// One thread's part in a job.
#[derive(Debug)]
pub struct Member<'t> {
    shared: &'t Shared,
    index: usize,
    members: usize,
}

/// Another member panicked: leave the job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Aborted;

/// A job that a member panicked in. The team is ready for the next one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Panicked(pub String);

/// What members run.
pub type Job<'j> = dyn Fn(&Member<'_>) -> Result<(), Aborted> + Sync + 'j;

impl Team {
    /// A team of `threads` members, at least 1: the caller and workers that sleep until needed.
    ///
    /// # Errors
    /// The system refuses a thread.
    pub fn new(threads: usize) -> std::io::Result<Self> {
        let members = threads.max(1);
        let mut team = Self { shared: Arc::new(Shared::new(members)), workers: Vec::new() };
        for index in 1..members {
            let shared = Arc::clone(&team.shared);
            let worker = std::thread::Builder::new()
                .name(format!("kernel-{index}"))
                .spawn(move || shared.work(index))?;
            team.workers.push(worker);
        }
        Ok(team)
    }

    /// Members, the caller included.
    pub fn threads(&self) -> usize {
        self.shared.members
    }

    /// Runs `job` once on every member and returns when all have left it.
    ///
    /// # Errors
    /// A member panicked; the others left at their next barrier.
    pub fn run(&mut self, job: &Job<'_>) -> Result<(), Panicked> {
        if self.workers.is_empty() {
            return self.run_alone(job);
        }
        let shared = &*self.shared;
        shared.reset();
        let finished = shared.finished.value();
        shared.running.store(self.workers.len(), Ordering::SeqCst);
        // SAFETY: only the lifetime changes. No worker holds the reference after it has counted
        // itself out of `running`, and this function waits for that.
        let lasting = unsafe { std::mem::transmute::<&Job<'_>, &'static Job<'static>>(job) };
        *lock(&shared.job) = Some(lasting);
        shared.started.advance();
        shared.take_part(job, 0, shared.members);
        shared.finished.wait_past(finished);
        shared.outcome()
    }

    /// Runs `job` on the caller alone, as a team of one, without waking anybody.
    ///
    /// # Errors
    /// The job panicked.
    pub fn run_alone(&mut self, job: &Job<'_>) -> Result<(), Panicked> {
        self.shared.reset();
        self.shared.take_part(job, 0, 1);
        self.shared.outcome()
    }
}

impl Drop for Team {
    fn drop(&mut self) {
        *lock(&self.shared.job) = None;
        self.shared.started.advance();
        for worker in self.workers.drain(..) {
            // A worker cannot panic outside a job, and inside one it is caught.
            let _ = worker.join();
        }
    }
}

impl Member<'_> {
    /// 0 is the caller.
    pub fn index(&self) -> usize {
        self.index
    }

    /// Members in this job.
    pub fn members(&self) -> usize {
        self.members
    }

    /// The next up to `chunk` of `0..total` that no member has claimed since the last barrier.
    pub fn claim(&self, total: usize, chunk: usize) -> Option<Range<usize>> {
        let start = self.shared.next.0.fetch_add(chunk, Ordering::Relaxed);
        (start < total).then(|| start..total.min(start + chunk))
    }

    /// Waits for every member; what each wrote before is seen by all after. Claims start anew.
    ///
    /// # Errors
    /// A member panicked and will never come: leave the job.
    pub fn barrier(&self) -> Result<(), Aborted> {
        self.barrier_after(|| ())
    }

    /// As [`Member::barrier`]; the member that comes last runs `last` before all go on. It may not
    /// claim.
    ///
    /// # Errors
    /// As [`Member::barrier`].
    pub fn barrier_after(&self, last: impl FnOnce()) -> Result<(), Aborted> {
        let shared = self.shared;
        let seen = shared.passed.value();
        if shared.aborted.load(Ordering::SeqCst) {
            return Err(Aborted);
        }
        if shared.arrived.0.fetch_add(1, Ordering::SeqCst) + 1 == self.members {
            shared.arrived.0.store(0, Ordering::SeqCst);
            shared.next.0.store(0, Ordering::SeqCst);
            last();
            shared.passed.advance();
        } else {
            shared.passed.wait_past(seen);
        }
        if shared.aborted.load(Ordering::SeqCst) { Err(Aborted) } else { Ok(()) }
    }
}

struct Shared {
    members: usize,
    job: Mutex<Option<&'static Job<'static>>>,
    started: Gate,
    finished: Gate,
    running: AtomicUsize,
    passed: Gate,
    arrived: Line<AtomicUsize>,
    next: Line<AtomicUsize>,
    aborted: AtomicBool,
    panic: Mutex<Option<String>>,
}

/// Keeps a hot counter on cache lines of its own.
#[repr(align(128))]
struct Line<T>(T);

impl Shared {
    fn new(members: usize) -> Self {
        Self {
            members,
            job: Mutex::new(None),
            started: Gate::default(),
            finished: Gate::default(),
            running: AtomicUsize::new(0),
            passed: Gate::default(),
            arrived: Line(AtomicUsize::new(0)),
            next: Line(AtomicUsize::new(0)),
            aborted: AtomicBool::new(false),
            panic: Mutex::new(None),
        }
    }

    /// Forgets the last job; no member is in it any more.
    fn reset(&self) {
        self.arrived.0.store(0, Ordering::SeqCst);
        self.next.0.store(0, Ordering::SeqCst);
        self.aborted.store(false, Ordering::SeqCst);
    }

    fn outcome(&self) -> Result<(), Panicked> {
        lock(&self.panic).take().map_or(Ok(()), |message| Err(Panicked(message)))
    }

    /// A worker's life: wait for a job, take part, count out.
    fn work(&self, index: usize) {
        let mut seen = 0;
        loop {
            self.started.wait_past(seen);
            // Jobs start one at a time, and none starts before this worker has left the last.
            seen = seen.wrapping_add(1);
            let Some(job) = *lock(&self.job) else { return };
            self.take_part(job, index, self.members);
            if self.running.fetch_sub(1, Ordering::SeqCst) == 1 {
                self.finished.advance();
            }
        }
    }

    fn take_part(&self, job: &Job<'_>, index: usize, members: usize) {
        let member = Member { shared: self, index, members };
        // Whatever a panic leaves half-written is rewritten by the next job before it is read.
        if let Err(payload) = catch_unwind(AssertUnwindSafe(|| job(&member))) {
            lock(&self.panic).get_or_insert_with(|| message_of(&*payload));
            self.aborted.store(true, Ordering::SeqCst);
            self.passed.advance();
        }
    }
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").field("members", &self.members).finish_non_exhaustive()
    }
}

/// A number that only grows, and threads that wait for it to do so.
#[derive(Default)]
struct Gate {
    value: AtomicU32,
    sleepers: AtomicU32,
    lock: Mutex<()>,
    woken: Condvar,
}

impl Gate {
    fn value(&self) -> u32 {
        self.value.load(Ordering::SeqCst)
    }

    fn advance(&self) {
        self.value.fetch_add(1, Ordering::SeqCst);
        // A sleeper counts itself before it looks at the value for the last time, and does both
        // under the lock: either it sees the new value, or it is seen here and is asleep by now.
        if self.sleepers.load(Ordering::SeqCst) > 0 {
            drop(lock(&self.lock));
            self.woken.notify_all();
        }
    }

    fn wait_past(&self, seen: u32) {
        // The clock costs more than a look at the value, so it is read now and then.
        const LOOKS: usize = 64;
        let mut began = None;
        loop {
            for _ in 0..LOOKS {
                if self.value() != seen {
                    return;
                }
                std::hint::spin_loop();
            }
            if began.get_or_insert_with(Instant::now).elapsed() > SPIN {
                break;
            }
        }
        let mut guard = lock(&self.lock);
        self.sleepers.fetch_add(1, Ordering::SeqCst);
        while self.value() == seen {
            guard = self.woken.wait(guard).unwrap_or_else(PoisonError::into_inner);
        }
        self.sleepers.fetch_sub(1, Ordering::SeqCst);
    }
}

/// No lock here is ever held across a panic, so poison says nothing.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn message_of(payload: &(dyn Any + Send)) -> String {
    let text = payload.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| payload.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "a kernel panicked".to_owned())
}

#[cfg(test)]
mod tests;
