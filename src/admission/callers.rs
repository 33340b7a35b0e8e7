//! Who calls: API keys become tenants. Holds digests only, compares all of them in constant time,
//! and follows the file of keys while the server runs. Knows no HTTP.

use std::collections::HashMap;
use std::collections::hash_map::RandomState;
use std::fmt;
use std::hash::BuildHasher;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use subtle::{ConditionallySelectable, ConstantTimeEq};

use super::quota::{Quota, Usage};
use crate::config::Auth;
use crate::config::error::ConfigError;
use crate::config::keys::{self, ApiKey, Digest};
use crate::error::{Error, ErrorKind, Result};
use crate::request::TenantId;
use crate::telemetry::Telemetry;

/// Everybody who may call.
pub struct Callers {
    /// None: everybody may.
    ring: Option<Ring>,
    telemetry: Arc<Telemetry>,
    /// Gives tenants without series of their own an id that nobody can aim at.
    hasher: RandomState,
}

/// Who sent a request.
#[derive(Debug, Clone, Default)]
pub struct Caller {
    /// Whose work it is.
    pub tenant: TenantId,
    /// May ask the admin listener and start a drain.
    pub admin: bool,
    pub(super) quota: Option<Quota>,
}

/// The keys and the file that they come from.
struct Ring {
    path: PathBuf,
    keys: RwLock<Arc<Vec<Known>>>,
    /// How the last look at the file went, so that a bad one is told once.
    seen: Mutex<Seen>,
}

#[derive(Debug, PartialEq, Eq)]
enum Seen {
    Keys(Vec<ApiKey>),
    Bad(String),
}

/// One key as it is looked up.
struct Known {
    digest: Digest,
    tenant: TenantId,
    /// It has no tenant of its own: a gateway's key, which may say whom it speaks for.
    speaks_for_others: bool,
    admin: bool,
    quota: Quota,
}

impl fmt::Debug for Callers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Callers").field("keys", &self.need_keys()).finish_non_exhaustive()
    }
}

impl Callers {
    /// Reads the file of keys, if there is to be one.
    ///
    /// # Errors
    /// The file is not there, has no key, or is wrong.
    pub fn open(auth: &Auth, telemetry: Arc<Telemetry>) -> std::result::Result<Self, ConfigError> {
        let mut callers = Self { ring: None, telemetry, hasher: RandomState::new() };
        if let Some(path) = &auth.keys_file {
            let keys = keys::load(path)?;
            tracing::info!(file = %path.display(), keys = keys.len(), "api keys read");
            let known = callers.known(&keys, &[]);
            callers.ring = Some(Ring {
                path: path.clone(),
                keys: RwLock::new(Arc::new(known)),
                seen: Mutex::new(Seen::Keys(keys)),
            });
        }
        Ok(callers)
    }

    /// Whether a key is needed.
    pub fn need_keys(&self) -> bool {
        self.ring.is_some()
    }

    /// The file to follow.
    pub fn file(&self) -> Option<&Path> {
        self.ring.as_ref().map(|ring| ring.path.as_path())
    }

    /// Who presents `key`; `tenant` is what the tenant header says.
    ///
    /// # Errors
    /// `Unauthorized`, the same for no key and for a wrong one; `InvalidRequest` for a tenant's
    /// name that cannot stand in a label.
    pub fn recognise(&self, key: Option<&[u8]>, tenant: Option<&[u8]>) -> Result<Caller> {
        let tenant = tenant.map(named).transpose()?;
        let Some(ring) = &self.ring else {
            let tenant = tenant.map_or_else(TenantId::default, |name| self.tenant(name));
            return Ok(Caller { tenant, admin: false, quota: None });
        };
        let keys = Arc::clone(&ring.keys.read().unwrap_or_else(PoisonError::into_inner));
        let known = key.and_then(|key| find(&keys, &Digest::of(key))).ok_or_else(|| {
            let message = "no valid API key; send one as 'Authorization: Bearer KEY'";
            Error::new(ErrorKind::Unauthorized, message)
        })?;
        let tenant = match tenant.filter(|_| known.speaks_for_others) {
            Some(name) => self.tenant(name),
            None => known.tenant,
        };
        Ok(Caller { tenant, admin: known.admin, quota: Some(known.quota.clone()) })
    }

    /// Looks at the file again: new keys hold from now on, and a file that is wrong changes
    /// nothing. Reads a file, so it may wait.
    pub fn reload(&self) {
        let Some(ring) = &self.ring else { return };
        let mut seen = ring.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let now = match keys::load(&ring.path) {
            Ok(keys) => Seen::Keys(keys),
            Err(error) => Seen::Bad(error.to_string()),
        };
        if *seen == now {
            return;
        }
        match &now {
            Seen::Bad(error) => tracing::error!(error, "the api keys stay as they were"),
            Seen::Keys(keys) => {
                let mut current = ring.keys.write().unwrap_or_else(PoisonError::into_inner);
                *current = Arc::new(self.known(keys, &current));
                tracing::info!(file = %ring.path.display(), keys = keys.len(), "api keys read");
            }
        }
        *seen = now;
    }

    /// Keys as they are looked up; what those of the same name have used stays.
    fn known(&self, keys: &[ApiKey], before: &[Known]) -> Vec<Known> {
        let used: HashMap<&str, &Arc<Usage>> =
            before.iter().map(|known| (&*known.quota.name, &known.quota.usage)).collect();
        let known = |key: &ApiKey| Known {
            digest: key.digest,
            tenant: self.tenant(key.tenant.as_ref().unwrap_or(&key.name)),
            speaks_for_others: key.tenant.is_none(),
            admin: key.admin,
            quota: Quota {
                name: key.name.as_str().into(),
                limits: key.limits,
                usage: used.get(key.name.as_str()).map_or_else(Arc::default, |&u| Arc::clone(u)),
            },
        };
        keys.iter().map(known).collect()
    }

    /// The tenant of this name. Two names never share an id but by a chance of one in two
    /// thousand million, which nobody can help along: prompts of one would be found in the other's
    /// cache.
    fn tenant(&self, name: &str) -> TenantId {
        let unlisted = || TenantId(self.hasher.hash_one(name) as u32 | 1 << 31);
        self.telemetry.tenant(name).unwrap_or_else(unlisted)
    }
}

impl Caller {
    /// Somebody on this machine, on the admin side.
    pub fn local() -> Self {
        Self { admin: true, ..Self::default() }
    }

    /// The name of the key, for logs.
    pub fn key(&self) -> Option<&str> {
        self.quota.as_ref().map(|quota| &*quota.name)
    }
}

/// The key with this digest: all are looked at, whichever it is.
fn find<'a>(keys: &'a [Known], digest: &Digest) -> Option<&'a Known> {
    const NONE: u32 = u32::MAX;
    let mut found = NONE;
    for (index, known) in (0..).zip(keys) {
        found.conditional_assign(&index, known.digest.0.ct_eq(&digest.0));
    }
    keys.get(found as usize)
}

fn named(bytes: &[u8]) -> Result<&str> {
    let name = std::str::from_utf8(bytes).ok().filter(|name| keys::is_name(name));
    name.ok_or_else(|| {
        let message = "the tenant header (auth.tenant_header) must hold 1 to 64 letters, digits \
                       and any of . _ - /";
        Error::new(ErrorKind::InvalidRequest, message)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::Setup;

    const FIRST: &[u8] = b"the-first-key-of-this-test";
    const SECOND: &[u8] = b"the-second-key-of-this-test";

    fn entry(name: &str, key: &[u8], rest: &str) -> String {
        let key = std::str::from_utf8(key).unwrap();
        format!("[[key]]\nname = \"{name}\"\nkey = \"{key}\"\n{rest}\n")
    }

    #[test]
    fn a_changed_file_holds_and_a_bad_one_does_not() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("keys");
        let write = |text: &str| std::fs::write(&file, text).unwrap();
        write(&entry("a", FIRST, "requests_per_minute = 2"));
        let auth = Auth { keys_file: Some(file.clone()), ..Auth::default() };
        let callers = Callers::open(&auth, Telemetry::new(Setup::default())).unwrap();
        let knows = |key: &[u8]| callers.recognise(Some(key), None);
        let enter = |key: &[u8]| knows(key)?.quota.unwrap().enter(crate::request::Micros(0));
        let first = knows(FIRST).unwrap();
        assert!(knows(SECOND).is_err() && knows(b"").is_err());
        assert!(callers.recognise(None, None).is_err());
        enter(FIRST).unwrap();

        // The same name with another key: what it has used stays used.
        write(&(entry("a", SECOND, "requests_per_minute = 2\nadmin = true")));
        assert!(knows(FIRST).is_ok(), "nobody has looked yet");
        callers.reload();
        assert!(knows(FIRST).is_err());
        let second = knows(SECOND).unwrap();
        assert_eq!((second.tenant, second.key(), second.admin), (first.tenant, Some("a"), true));
        enter(SECOND).unwrap();
        assert!(enter(SECOND).is_err());

        for bad in ["", "[[key]]", "key = 5", &entry("a b", FIRST, "")] {
            write(bad);
            callers.reload();
            assert!(knows(SECOND).is_ok() && knows(FIRST).is_err(), "{bad}");
        }
        std::fs::remove_file(&file).unwrap();
        callers.reload();
        assert!(knows(SECOND).is_ok());
        write(&(entry("b", FIRST, "") + &entry("a", SECOND, "")));
        callers.reload();
        assert_ne!(knows(FIRST).unwrap().tenant, knows(SECOND).unwrap().tenant);
        assert!(enter(SECOND).is_ok(), "without a limit now");
    }

    #[test]
    fn tenants_beyond_the_labels_do_not_share_a_cache() {
        let callers = Callers::open(&Auth::default(), Telemetry::new(Setup::default())).unwrap();
        let tenant = |name: &str| callers.recognise(None, Some(name.as_bytes())).unwrap().tenant;
        let names: Vec<String> = (0..500).map(|n| format!("t{n}")).collect();
        let ids: std::collections::HashSet<_> = names.iter().map(|name| tenant(name)).collect();
        assert_eq!(ids.len(), names.len());
        assert!(names.iter().all(|name| ids.contains(&tenant(name))), "the same every time");
        assert!(!ids.contains(&TenantId::default()));
    }
}
