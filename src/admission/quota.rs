//! How much one API key may ask for: requests and tokens a minute, requests at once. Arithmetic
//! over a clock that is given in; knows no HTTP.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::config::keys::KeyLimits;
use crate::error::{Error, ErrorKind, Result};
use crate::request::Micros;

/// The windows in which requests and tokens are counted.
const MINUTE: u64 = 60_000_000;

/// How soon a place among a key's requests may be free.
const SOON: Duration = Duration::from_secs(1);

/// What one key has used; outlives a change of its limits.
#[derive(Debug, Default)]
pub(super) struct Usage(Mutex<Numbers>);

#[derive(Debug, Default)]
struct Numbers {
    /// When the current minute began.
    begun: Micros,
    requests: u64,
    /// Of this minute, and what earlier minutes took beyond their limit: what a request takes is
    /// known only when it is over.
    tokens: u64,
    running: u64,
}

/// One key's limits with what it has used.
#[derive(Debug, Clone)]
pub(super) struct Quota {
    pub(super) name: Arc<str>,
    pub(super) limits: KeyLimits,
    pub(super) usage: Arc<Usage>,
}

/// One running request of a key; over when dropped.
#[derive(Debug)]
pub(super) struct Pass(Quota);

impl Quota {
    /// Lets a request in.
    ///
    /// # Errors
    /// `RateLimited`, to be tried again when the limit allows it.
    pub(super) fn enter(&self, now: Micros) -> Result<Pass> {
        let limits = &self.limits;
        let mut numbers = self.usage.roll(now, limits);
        let left = Micros(MINUTE).since(now.since(numbers.begun));
        let left = Duration::from_micros(left.0);
        let refuse = |what: String, wait: Duration| {
            let message = format!("the key '{}' has {what} in the file of keys)", self.name);
            Err(Error::new(ErrorKind::RateLimited, message).retry_after(wait))
        };
        if let Some(most) = limits.concurrency.filter(|most| numbers.running >= *most) {
            let running = numbers.running;
            return refuse(
                format!("{running} requests running, the limit is {most} (concurrency"),
                SOON,
            );
        }
        if let Some(most) = limits.requests_per_minute.filter(|most| numbers.requests >= *most) {
            let made = numbers.requests;
            let what = format!("made {made} requests in this minute, the limit is {most}");
            return refuse(format!("{what} (requests_per_minute"), left);
        }
        if let Some(most) = limits.tokens_per_minute.filter(|most| numbers.tokens >= *most) {
            let used = numbers.tokens;
            let what = format!("used {used} tokens in this minute, the limit is {most}");
            // What was used beyond the limit is paid back by the minutes that follow.
            let more = u32::try_from(used / most - 1).unwrap_or(u32::MAX);
            let wait = left.saturating_add(Duration::from_micros(MINUTE).saturating_mul(more));
            return refuse(format!("{what} (tokens_per_minute"), wait);
        }
        numbers.requests += 1;
        numbers.running += 1;
        Ok(Pass(self.clone()))
    }
}

impl Pass {
    /// Books tokens that the request takes.
    pub(super) fn spend(&self, now: Micros, tokens: u64) {
        self.0.usage.roll(now, &self.0.limits).tokens += tokens;
    }
}

impl Drop for Pass {
    fn drop(&mut self) {
        self.0.usage.lock().running -= 1;
    }
}

impl Usage {
    /// The numbers as of `now`.
    fn roll(&self, now: Micros, limits: &KeyLimits) -> MutexGuard<'_, Numbers> {
        let mut numbers = self.lock();
        let minutes = now.since(numbers.begun).0 / MINUTE;
        if minutes > 0 {
            numbers.begun = numbers.begun.plus(Micros(minutes * MINUTE));
            numbers.requests = 0;
            let paid = limits.tokens_per_minute.unwrap_or(u64::MAX).saturating_mul(minutes);
            numbers.tokens = numbers.tokens.saturating_sub(paid);
        }
        numbers
    }

    fn lock(&self) -> MutexGuard<'_, Numbers> {
        // Numbers are whole after every statement, so those that a panic left behind are good.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn quota(limits: KeyLimits) -> Quota {
        Quota { name: "ci".into(), limits, usage: Arc::default() }
    }

    fn at(seconds: u64) -> Micros {
        Micros(seconds * 1_000_000)
    }

    fn refused(quota: &Quota, now: Micros) -> u64 {
        let error = quota.enter(now).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::RateLimited);
        assert!(error.message().contains("'ci'"), "{error}");
        error.wait().unwrap().as_secs()
    }

    #[test]
    fn requests_count_by_the_minute() {
        let quota = quota(KeyLimits { requests_per_minute: Some(2), ..KeyLimits::default() });
        for second in [10, 20] {
            drop(quota.enter(at(second)).unwrap());
        }
        assert_eq!(refused(&quota, at(25)), 35, "the end of the window");
        assert_eq!(refused(&quota, at(59)), 1);
        drop(quota.enter(at(60)).unwrap());
        drop(quota.enter(at(400)).unwrap());
        drop(quota.enter(at(401)).unwrap());
        assert_eq!(refused(&quota, at(402)), 18, "windows stay where they began");
    }

    #[test]
    fn requests_at_once_are_counted_until_they_end() {
        let quota = quota(KeyLimits { concurrency: Some(2), ..KeyLimits::default() });
        let first = quota.enter(at(1)).unwrap();
        let _second = quota.enter(at(1)).unwrap();
        assert_eq!(refused(&quota, at(100)), 1);
        drop(first);
        let _third = quota.enter(at(100)).unwrap();
        assert_eq!(refused(&quota, at(100)), 1);
    }

    #[test]
    fn tokens_beyond_the_limit_are_paid_back() {
        let quota = quota(KeyLimits { tokens_per_minute: Some(100), ..KeyLimits::default() });
        let pass = quota.enter(at(0)).unwrap();
        pass.spend(at(1), 99);
        let late = quota.enter(at(2)).unwrap();
        late.spend(at(2), 251);
        assert_eq!(refused(&quota, at(10)), 50 + 120);
        assert_eq!(refused(&quota, at(70)), 50 + 60, "250 are left");
        assert_eq!(refused(&quota, at(130)), 50, "150 are left");
        drop(quota.enter(at(180)).unwrap());
    }

    #[test]
    fn no_limits_refuse_nothing() {
        let quota = quota(KeyLimits::default());
        let passes: Vec<_> = (0..1_000).map(|_| quota.enter(at(1)).unwrap()).collect();
        passes[0].spend(at(1), u64::MAX / 2);
        quota.enter(at(1)).unwrap();
    }
}
