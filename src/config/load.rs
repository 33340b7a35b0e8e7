//! Puts flags, environment, sconce.toml and defaults together, in this order of precedence, and
//! checks what no single value can tell. Every error is one line that names its culprit.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::document::{self, Entry};
use super::error::{ConfigError, Fault};
use super::flags::Flags;
use super::settings::{self, Setting};
use super::values::nearest;
use super::{Config, Effective, Note, Source, cache, manifest};

const PREFIX: &str = "SCONCE_";
const DEFAULT_FILE: &str = "sconce.toml";
/// Far above any sensible file, far below what would hurt.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// The process environment, or a test's. An empty variable counts as unset.
#[derive(Debug, Clone, Default)]
pub struct Environment(BTreeMap<String, String>);

impl Environment {
    /// This process's; bytes that are not UTF-8 are replaced.
    pub fn current() -> Self {
        let text = |part: std::ffi::OsString| part.to_string_lossy().into_owned();
        Self(std::env::vars_os().map(|(name, value)| (text(name), text(value))).collect())
    }

    /// Just these.
    pub fn of(variables: &[(&str, &str)]) -> Self {
        let owned = |&(name, value): &(&str, &str)| (name.to_owned(), value.to_owned());
        Self(variables.iter().map(owned).collect())
    }

    /// The value of `name`.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str).filter(|value| !value.is_empty())
    }
}

/// The sconce.toml in use.
#[derive(Debug, Default)]
struct File {
    path: PathBuf,
    entries: Vec<Entry>,
}

/// Reads, parses and checks everything.
///
/// # Errors
/// The first thing that is wrong, with where it stands and what is allowed.
pub fn load(flags: &Flags, environment: &Environment) -> Result<Config, ConfigError> {
    let file = File::open(flags, environment)?;
    file.check_keys()?;
    let mut config = Config::default();
    if environment.get("KUBERNETES_SERVICE_HOST").is_some() {
        config.drain.grace = Duration::from_secs(30);
    }
    let mut sources = Vec::new();
    for setting in settings::all() {
        sources.push(apply(&mut config, setting, flags, environment, &file)?);
    }
    config.notes = notes(environment);
    check_together(&config)?;
    let source_of = |key| {
        let found = settings::all().zip(&sources).find(|(setting, _)| setting.key == key);
        found.map_or(Source::Default, |(_, source)| source.clone())
    };
    if source_of("models.cache_dir") == Source::Default {
        config.models.cache_dir = cache::default_dir(environment)?;
    }
    if source_of("models.hub_cache") == Source::Default {
        config.models.hub_cache = cache::hub_dir(environment);
    }
    let chosen = source_of("models.dir") != Source::Default;
    config.manifests = manifest::load(&config.models.dir, chosen)?;
    config.values = settings::all()
        .zip(sources)
        .map(|(setting, source)| Effective {
            key: setting.key,
            value: (setting.get)(&config),
            source,
        })
        .collect();
    Ok(config)
}

/// Gives one setting its value and says who gave it.
fn apply(
    config: &mut Config,
    setting: &Setting,
    flags: &Flags,
    environment: &Environment,
    file: &File,
) -> Result<Source, ConfigError> {
    let (text, source) = if let Some((flag, text)) = flags.get(setting.key) {
        (Some(text), Source::Flag(flag))
    } else if let Some((name, text)) = from_environment(setting, environment) {
        (Some(text), Source::Env(name))
    } else if let Some(entry) = file.entries.iter().find(|entry| entry.key == setting.key) {
        (entry.text.as_deref(), Source::File(file.path.clone(), entry.line))
    } else {
        return Ok(Source::Default);
    };
    let result = text.map_or_else(
        || Err("a plain value, or a list of these".to_owned()),
        |text| (setting.set)(config, text.trim()),
    );
    result.map_err(|allowed| not_allowed(setting, text.unwrap_or("a table"), &source, &allowed))?;
    Ok(source)
}

fn from_environment<'a>(
    setting: &Setting,
    environment: &'a Environment,
) -> Option<(&'static str, &'a str)> {
    let mut set = setting.env.iter().filter_map(|name| Some((*name, environment.get(name)?)));
    set.find(|(_, text)| !service_address(text))
}

fn not_allowed(setting: &Setting, text: &str, source: &Source, allowed: &str) -> ConfigError {
    let key = setting.key;
    let hidden = key == "models.hub_token";
    let text = if hidden { "(not shown)".to_owned() } else { text.replace('\n', ", ") };
    match source {
        Source::Flag(flag) => {
            let message = format!("{flag} {text:?} cannot be used: {key} must be {allowed}");
            ConfigError::new(Fault::Usage, message)
        }
        Source::Env(name) => {
            let message = format!("{name}={text:?} cannot be used: {key} must be {allowed}");
            ConfigError::new(Fault::Config, message)
        }
        Source::File(..) | Source::Default => {
            let message = format!("{source}: {key} = {text:?} cannot be used: must be {allowed}");
            ConfigError::new(Fault::Config, message)
        }
    }
}

/// What no single value can tell.
fn check_together(config: &Config) -> Result<(), ConfigError> {
    let listeners = [("server", &config.server.hosts), ("admin", &config.admin.hosts)];
    for (section, hosts) in listeners {
        let open = hosts.iter().find(|host| !host.is_loopback());
        let guarded = config.auth.no_auth || config.auth.keys_file.is_some();
        if let Some(host) = open.filter(|_| !guarded) {
            let message = format!(
                "{section}.host {host} is reachable from other machines, and no API keys guard \
                 it: set auth.keys_file (SCONCE_KEYS_FILE), bind to loopback, or set --no-auth \
                 (SCONCE_NO_AUTH=true) where the network decides who may call"
            );
            return Err(ConfigError::new(Fault::Config, message));
        }
    }
    if config.auth.no_auth && config.auth.keys_file.is_some() {
        let message = "auth.no_auth and auth.keys_file contradict each other: unset one of them";
        return Err(ConfigError::new(Fault::Config, message));
    }
    let port = config.server.port;
    if port != 0 && port == config.admin.port {
        let message = format!("server.port and admin.port are both {port}: they must differ");
        return Err(ConfigError::new(Fault::Config, message));
    }
    Ok(())
}

impl File {
    /// The file that was asked for, or the default one if it exists.
    fn open(flags: &Flags, environment: &Environment) -> Result<Self, ConfigError> {
        let from_flag = flags.config.clone().map(|path| (path, "--config"));
        let from_env = environment.get("SCONCE_CONFIG").map(|path| (path.into(), "SCONCE_CONFIG"));
        let (path, who) = match from_flag.or(from_env) {
            Some(asked) => asked,
            None if Path::new(DEFAULT_FILE).exists() => (DEFAULT_FILE.into(), "default"),
            None => return Ok(Self::default()),
        };
        let text = read_text(&path).map_err(|reason| {
            let message = format!("{}: cannot be read ({who}): {reason}", path.display());
            ConfigError::new(Fault::NoInput, message)
        })?;
        let entries = document::entries(&text).map_err(|(line, reason)| {
            let message = format!("{}:{line}: not valid TOML: {reason}", path.display());
            ConfigError::new(Fault::Config, message)
        })?;
        Ok(Self { path, entries })
    }

    /// Refuses keys that do not exist: a misspelt limit must not be silently without effect.
    fn check_keys(&self) -> Result<(), ConfigError> {
        let known: Vec<&str> = settings::all().map(|setting| setting.key).collect();
        let mut entries = self.entries.iter();
        let Some(entry) = entries.find(|entry| !known.contains(&entry.key.as_str())) else {
            return Ok(());
        };
        let hint = match nearest(&entry.key, known.iter().copied()) {
            Some(nearest) => format!("did you mean {nearest}?"),
            None => {
                let section = entry.key.split('.').next().unwrap_or_default();
                let same = |key: &&&str| key.split('.').next() == Some(section);
                let inside: Vec<&str> = known.iter().filter(same).copied().collect();
                let all = if inside.is_empty() { known } else { inside };
                format!("the keys here are {}", all.join(", "))
            }
        };
        let (path, line) = (self.path.display(), entry.line);
        let message = format!("{path}:{line}: unknown key {}: {hint}", entry.key);
        Err(ConfigError::new(Fault::Config, message))
    }
}

/// The whole of a small text file, or why not.
pub(super) fn read_text(path: &Path) -> Result<String, String> {
    let plain = |error: std::io::Error| match error.kind() {
        ErrorKind::NotFound => "no such file".to_owned(),
        ErrorKind::InvalidData => "not UTF-8 text".to_owned(),
        _ => error.to_string(),
    };
    let length = std::fs::metadata(path).map_err(plain)?.len();
    if length > FILE_BYTES_MAX {
        return Err(format!("{length} bytes, and at most {FILE_BYTES_MAX} are read"));
    }
    std::fs::read_to_string(path).map_err(plain)
}

/// One line of detail for all that Kubernetes injects, one warning for each name nobody knows.
fn notes(environment: &Environment) -> Vec<Note> {
    let settings = settings::all().flat_map(|setting| setting.env.iter().copied());
    let known: Vec<&str> = settings.chain(["SCONCE_CONFIG"]).collect();
    let mut injected = Vec::new();
    let mut notes = Vec::new();
    let ours = environment.0.iter().filter(|(name, _)| name.starts_with(PREFIX));
    for (name, value) in ours {
        if service_address(value) || (!known.contains(&name.as_str()) && service_name(name)) {
            injected.push(name.as_str());
        } else if !known.contains(&name.as_str()) {
            let hint = nearest(name, known.iter().copied())
                .map(|nearest| format!(": did you mean {nearest}?"))
                .unwrap_or_default();
            let text = format!("unknown environment variable {name} has no effect{hint}");
            notes.push(Note { warning: true, text });
        }
    }
    if !injected.is_empty() {
        let names = injected.join(", ");
        let text = format!("ignored what Kubernetes injects for a Service: {names}");
        notes.push(Note { warning: false, text });
    }
    notes
}

/// Whether a value is what Kubernetes injects for a Service's port.
fn service_address(value: &str) -> bool {
    ["tcp://", "udp://", "sctp://"].iter().any(|scheme| value.starts_with(scheme))
}

/// Whether a name is one that Kubernetes injects for a Service `sconce` or `sconce-SOMETHING`.
fn service_name(name: &str) -> bool {
    let rest = &name[PREFIX.len()..];
    let port = |rest: &str| {
        let digits = rest.trim_start_matches(|c: char| c.is_ascii_digit());
        digits.len() < rest.len() && digits.starts_with('_')
    };
    rest.starts_with("SERVICE_")
        || rest.starts_with("PORT_")
        || rest.ends_with("_SERVICE_HOST")
        || rest.contains("_SERVICE_PORT")
        || rest.split("_PORT_").skip(1).any(port)
}
