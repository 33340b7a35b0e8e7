//! The file of API keys: who may call, as which tenant, how much. Only digests are kept, and no
//! message quotes what stands in the file. Knows nothing of requests.

use std::collections::HashSet;
use std::fmt;
use std::path::Path;

use serde::Deserialize;
use sha2::{Digest as _, Sha256};

use super::document::{self, Step, line_at};
use super::error::{ConfigError, Fault};
use super::load::read_text;

/// Most keys: each request is compared with all of them.
const KEYS_MAX: usize = 1024;

/// Shortest key that is not given by its digest: shorter ones can be tried out.
const PLAIN_BYTES_MIN: usize = 16;

/// What a file of keys may hold, for messages.
const SHAPE: &str = "[[key]] tables with name and key, and optionally tenant, admin, \
                     requests_per_minute, tokens_per_minute, concurrency";

/// One API key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ApiKey {
    /// What logs call it.
    pub name: String,
    /// Of the key.
    pub digest: Digest,
    /// Whose it is; none: whom the tenant header names, or else the key's own name.
    pub tenant: Option<String>,
    /// May also ask the admin listener, and start a drain.
    pub admin: bool,
    /// How much it may ask for.
    pub limits: KeyLimits,
}

/// How much one key may ask for; none: no limit of its own.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct KeyLimits {
    /// Requests in a minute.
    pub requests_per_minute: Option<u64>,
    /// Prompt and generated tokens in a minute.
    pub tokens_per_minute: Option<u64>,
    /// Requests at once.
    pub concurrency: Option<u64>,
}

/// A key's SHA-256; not shown.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Digest(pub [u8; 32]);

impl Digest {
    /// Of a key as a client sends it.
    pub fn of(key: &[u8]) -> Self {
        Self(Sha256::digest(key).into())
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Digest(..)")
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Document {
    #[serde(default)]
    key: Vec<Entry>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    name: String,
    key: String,
    tenant: Option<String>,
    #[serde(default)]
    admin: bool,
    requests_per_minute: Option<u64>,
    tokens_per_minute: Option<u64>,
    concurrency: Option<u64>,
}

/// Reads and checks a file of keys; at least one is in it.
///
/// # Errors
/// The file and line, and what is allowed there.
pub fn load(path: &Path) -> Result<Vec<ApiKey>, ConfigError> {
    let text = read_text(path).map_err(|reason| {
        let message = format!("{}: cannot be read (auth.keys_file): {reason}", path.display());
        ConfigError::new(Fault::NoInput, message)
    })?;
    parse(path, &text)
}

/// Checks the text of a file of keys.
///
/// # Errors
/// As [`load`].
pub fn parse(path: &Path, text: &str) -> Result<Vec<ApiKey>, ConfigError> {
    let refuse = |line: usize, what: String| {
        let message = format!("{}:{line}: {what} (auth.keys_file)", path.display());
        Err(ConfigError::new(Fault::Config, message))
    };
    let document: Document = match toml::from_str(text) {
        Ok(document) => document,
        // The parser's own message may quote a key.
        Err(error) => {
            return refuse(document::fault(text, &error).0, format!("this must be {SHAPE}"));
        }
    };
    if document.key.is_empty() {
        return refuse(1, format!("no key in it: there must be {SHAPE}"));
    }
    if document.key.len() > KEYS_MAX {
        return refuse(1, format!("{} keys, at most {KEYS_MAX}", document.key.len()));
    }
    let (mut names, mut digests) = (HashSet::new(), HashSet::new());
    let mut keys = Vec::with_capacity(document.key.len());
    for (index, entry) in document.key.into_iter().enumerate() {
        let line = || line_at(text, &[Step::Key("key"), Step::Item(index)]);
        let key = match check(entry) {
            Ok(key) => key,
            Err(what) => return refuse(line(), what),
        };
        if !names.insert(key.name.clone()) {
            return refuse(line(), format!("the name '{}' is there twice", key.name));
        }
        if !digests.insert(key.digest) {
            return refuse(line(), format!("the key of '{}' is there twice", key.name));
        }
        keys.push(key);
    }
    Ok(keys)
}

fn check(entry: Entry) -> Result<ApiKey, String> {
    for (what, text) in [("name", Some(&entry.name)), ("tenant", entry.tenant.as_ref())] {
        if text.is_some_and(|text| !is_name(text)) {
            return Err(format!("{what} must be 1 to 64 letters, digits and any of . _ - /"));
        }
    }
    let limits = KeyLimits {
        requests_per_minute: entry.requests_per_minute,
        tokens_per_minute: entry.tokens_per_minute,
        concurrency: entry.concurrency,
    };
    let all = [limits.requests_per_minute, limits.tokens_per_minute, limits.concurrency];
    if all.contains(&Some(0)) {
        return Err("a limit of 0 lets nothing in: leave it out, or take the key away".into());
    }
    let digest = digest(&entry.key)?;
    Ok(ApiKey { name: entry.name, digest, tenant: entry.tenant, admin: entry.admin, limits })
}

/// Whether `text` can stand in logs and labels as it is.
pub fn is_name(text: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"._-/".contains(&byte);
    (1..=64).contains(&text.len()) && text.bytes().all(allowed)
}

/// Of `sha256:` and 64 hexadecimal digits, or of a key in plain text.
fn digest(text: &str) -> Result<Digest, String> {
    let Some(hex) = text.strip_prefix("sha256:") else {
        let plain = text.len() >= PLAIN_BYTES_MIN && text.bytes().all(|b| b.is_ascii_graphic());
        return match plain {
            true => Ok(Digest::of(text.as_bytes())),
            false => Err(format!(
                "key must be at least {PLAIN_BYTES_MIN} visible ASCII characters, or sha256: and \
                 the 64 hexadecimal digits of its digest"
            )),
        };
    };
    let digits: Option<Vec<u8>> =
        hex.chars().map(|c| c.to_digit(16).map(|digit| digit as u8)).collect();
    let bytes = digits.filter(|digits| digits.len() == 64);
    let bytes = bytes.ok_or("after sha256: there must be 64 hexadecimal digits")?;
    let mut digest = [0; 32];
    for (byte, pair) in digest.iter_mut().zip(bytes.as_chunks::<2>().0) {
        *byte = pair[0] << 4 | pair[1];
    }
    Ok(Digest(digest))
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: &str = "correct-horse-battery-staple";

    fn parsed(text: &str) -> Result<Vec<ApiKey>, String> {
        parse(Path::new("keys.toml"), text).map_err(|error| error.to_string())
    }

    #[test]
    fn keys_in_plain_text_and_as_digests() {
        // printf %s correct-horse-battery-staple | sha256sum
        let hex = "87cbebfeebc05f7c54ac9336c4b4bbec831227a641951a4bde7edd56020f8590";
        let other = "another-key-of-some-length";
        let text = format!(
            "[[key]]\nname = \"ci\"\nkey = \"{other}\"\n[[key]]\nname = \"team/a\"\n\
             key = \"sha256:{hex}\"\ntenant = \"a\"\nadmin = true\n\
             requests_per_minute = 60\ntokens_per_minute = 1000\nconcurrency = 2\n"
        );
        let keys = parsed(&text).unwrap();
        assert_eq!(keys[0].digest, Digest::of(other.as_bytes()));
        assert_eq!((keys[0].tenant.as_deref(), keys[0].admin), (None, false));
        assert_eq!(keys[0].limits, KeyLimits::default());
        assert_eq!(keys[1].digest, Digest::of(PLAIN.as_bytes()));
        assert_eq!((keys[1].tenant.as_deref(), keys[1].admin), (Some("a"), true));
        assert_eq!(keys[1].limits.concurrency, Some(2));
        assert!(!format!("{keys:?}").contains("87"), "{keys:?}");
    }

    #[test]
    fn what_is_wrong_is_told_without_the_key() {
        let key = |rest: &str| format!("[[key]]\nname = \"a\"\nkey = \"{PLAIN}\"\n{rest}");
        for (text, line, says) in [
            (String::new(), 1, "no key in it"),
            ("# nothing".into(), 1, "no key in it"),
            (PLAIN.into(), 1, "[[key]] tables"),
            (key("limit = 3"), 4, "[[key]] tables"),
            (key(&format!("concurrency = \"{PLAIN}\"")), 4, "[[key]] tables"),
            (key("concurrency = -1"), 4, "[[key]] tables"),
            (key("concurrency = 0"), 1, "a limit of 0"),
            (key("tenant = \"a b\""), 1, "tenant must be"),
            (key(&key("")), 4, "the name 'a' is there twice"),
            (key(&key("").replace("\"a\"", "\"b\"")), 4, "the key of 'b' is there twice"),
            ("[[key]]\nname = \"a\"\nkey = \"short\"".into(), 1, "at least 16"),
            ("[[key]]\nname = \"a\"\nkey = \"sha256:12\"".into(), 1, "64 hexadecimal"),
            ("[[key]]\nname = \"\"\nkey = \"0123456789abcdef\"".into(), 1, "name must be"),
        ] {
            let error = parsed(&text).unwrap_err();
            assert!(error.starts_with(&format!("keys.toml:{line}: ")), "{text}: {error}");
            assert!(error.contains(says) && error.contains("auth.keys_file"), "{error}");
            assert!(!error.contains(PLAIN) && !error.contains("short"), "{error}");
        }
        let missing = load(Path::new("/nonexistent/keys")).unwrap_err();
        assert_eq!(missing.exit_code(), 66);
    }
}
