//! Precedence, sources, ranges, injected names, manifests. No network; files in temporary folders.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Parser;

use super::error::{ConfigError, Fault};
use super::flags::Flags;
use super::load::{Environment, load};
use super::{Config, MemoryLimit, Source, cache, manifest, settings};

#[derive(Debug, Parser)]
struct Line {
    #[command(flatten)]
    flags: Flags,
}

fn flags(words: &[&str]) -> Flags {
    let words = ["sconce"].into_iter().chain(words.iter().copied());
    Line::try_parse_from(words).expect("flags").flags
}

/// Loads with a sconce.toml of this text, flags and environment.
fn with(toml: &str, words: &[&str], env: &[(&str, &str)]) -> Result<Config, ConfigError> {
    let dir = tempfile::tempdir().expect("a folder");
    let path = dir.path().join("test.toml");
    fs::write(&path, toml).expect("a file");
    let path = path.to_string_lossy().into_owned();
    let cache = dir.path().join("cache").to_string_lossy().into_owned();
    let mut all: Vec<&str> = words.to_vec();
    all.extend(["--config", &path]);
    let variables: Vec<_> =
        [("XDG_CACHE_HOME", cache.as_str())].iter().chain(env).copied().collect();
    load(&flags(&all), &Environment::of(&variables))
}

fn refused(toml: &str, words: &[&str], env: &[(&str, &str)]) -> ConfigError {
    let error = with(toml, words, env).expect_err("must be refused");
    assert!(!error.to_string().contains('\n'), "one line: {error}");
    error
}

#[test]
fn flag_beats_environment_beats_file_beats_default() {
    let file = "[server]\nport = 1\n[limits]\nqueue_requests = 7";
    let env = [("SCONCE_PORT", "2")];
    let source = |config: &Config| {
        let value = config.values.iter().find(|value| value.key == "server.port").expect("port");
        assert_eq!(value.value, config.server.port.to_string());
        value.source.clone()
    };
    let config = with(file, &["--port", "3"], &env).expect("valid");
    assert_eq!((config.server.port, source(&config)), (3, Source::Flag("--port")));
    assert_eq!(config.limits.queue_requests, 7);
    let config = with(file, &[], &env).expect("valid");
    assert_eq!((config.server.port, source(&config)), (2, Source::Env("SCONCE_PORT")));
    let config = with(file, &[], &[]).expect("valid");
    assert!(matches!(source(&config), Source::File(_, 2)), "{:?}", source(&config));
    assert_eq!(config.server.port, 1);
    let config = with("", &[], &[("SCONCE_PORT", "")]).expect("valid");
    assert_eq!((config.server.port, source(&config)), (8080, Source::Default));
    assert_eq!(config.values.len(), settings::all().count());
}

#[test]
fn defaults_are_the_documented_ones() {
    let config = with("", &[], &[]).expect("valid");
    assert_eq!(super::values::join(&config.server.hosts, ","), "127.0.0.1,::1");
    assert_eq!((config.server.port, config.admin.port), (8080, 9464));
    assert_eq!(config.server.max_body_bytes, 4 << 20);
    assert_eq!(config.drain.grace, Duration::from_secs(120));
    assert_eq!(config.models.roots, [Path::new("/models"), Path::new("/mnt/models")]);
    let cluster = [("KUBERNETES_SERVICE_HOST", "10.0.0.1")];
    let config = with("", &[], &cluster).expect("valid");
    assert_eq!(config.drain.grace, Duration::from_secs(30));
    let config = with("[drain]\ngrace_seconds = 15.5", &[], &cluster).expect("valid");
    assert_eq!(config.drain.grace, Duration::from_secs_f64(15.5));
}

#[test]
fn what_kubernetes_injects_is_ignored_with_one_line() {
    let injected = [
        ("SCONCE_PORT", "tcp://10.96.0.7:80"),
        ("SCONCE_SERVICE_HOST", "10.96.0.7"),
        ("SCONCE_SERVICE_PORT", "80"),
        ("SCONCE_SERVICE_PORT_HTTP", "80"),
        ("SCONCE_PORT_80_TCP", "tcp://10.96.0.7:80"),
        ("SCONCE_PORT_80_TCP_PROTO", "tcp"),
        ("SCONCE_PORT_80_TCP_PORT", "80"),
        ("SCONCE_PORT_80_TCP_ADDR", "10.96.0.7"),
        ("SCONCE_PORT_53_UDP", "udp://10.96.0.7:53"),
        ("SCONCE_ADMIN_PORT", "tcp://10.96.0.8:9464"),
        ("SCONCE_ADMIN_SERVICE_HOST", "10.96.0.8"),
        ("SCONCE_ADMIN_SERVICE_PORT", "9464"),
        ("SCONCE_ADMIN_SERVICE_PORT_METRICS", "9464"),
        ("SCONCE_ADMIN_PORT_9464_TCP", "tcp://10.96.0.8:9464"),
        ("SCONCE_ADMIN_PORT_9464_TCP_ADDR", "10.96.0.8"),
        ("SCONCE_ADMIN_PORT_9464_TCP_PORT", "9464"),
    ];
    let config = with("", &[], &injected).expect("valid");
    assert_eq!((config.server.port, config.admin.port), (8080, 9464));
    assert_eq!(config.notes.len(), 1, "{:?}", config.notes);
    assert!(!config.notes[0].warning);
    for (name, value) in injected {
        assert!(config.notes[0].text.contains(name), "{name}");
        let alone = with("", &[], &[(name, value)]).expect("valid");
        assert!(alone.notes.len() == 1 && !alone.notes[0].warning, "{name}: {:?}", alone.notes);
    }
    let config = with("[server]\nport = 81", &[], &injected).expect("valid");
    assert_eq!(config.server.port, 81, "the file still counts");
}

#[test]
fn unknown_environment_is_a_warning() {
    let env = [("SCONCE_GRACE_SECOND", "5"), ("SCONCE_XYZZY", "1"), ("OTHER", "1")];
    let config = with("", &[], &env).expect("valid");
    assert_eq!(config.notes.len(), 2, "{:?}", config.notes);
    assert!(config.notes.iter().all(|note| note.warning));
    assert!(config.notes[0].text.contains("did you mean SCONCE_GRACE_SECONDS?"));
    assert!(!config.notes[1].text.contains("did you mean"), "{}", config.notes[1].text);
}

#[test]
fn an_unknown_key_is_fatal_and_the_nearest_is_named() {
    for (toml, line, says) in [
        ("[server]\nprot = 1", 2, "unknown key server.prot: did you mean server.port?"),
        ("[limit]\nqueue_requests = 1", 2, "did you mean limits.queue_requests?"),
        ("port = 1", 1, "unknown key port"),
        ("[server.deeper]\nport = 1", 1, "server.deeper"),
        ("\n\n[drain]\nabsolutely_else = 1", 4, "drain.grace_seconds, drain.linger_seconds"),
    ] {
        let error = refused(toml, &[], &[]);
        let message = error.to_string();
        assert!(message.contains(&format!("test.toml:{line}: ")), "{message}");
        assert!(message.contains(says), "{message}");
        assert_eq!(error.exit_code(), 78);
    }
}

/// Values that no setting takes: every setting is here.
const BAD: &[(&str, &[&str])] = &[
    ("server.host", &["nowhere", "1.2.3", "127.0.0.1;::1"]),
    ("server.port", &["65536", "-1", "http", "80.5"]),
    ("server.keep_alive_seconds", &["0", "86401", "soon", "nan", "inf"]),
    ("server.max_connection_age_seconds", &["0.5", "1e9"]),
    ("server.max_connections", &["0", "1000001", "1.5"]),
    ("server.max_body_bytes", &["0", "2GiB", "4 MiBs", "-1", "99999999999999999999TiB"]),
    ("server.body_timeout_seconds", &["0", "3601"]),
    ("server.write_timeout_seconds", &["0", "never"]),
    ("admin.host", &["nowhere"]),
    ("admin.port", &["65536"]),
    ("admin.metrics_on_main", &["maybe", "2"]),
    ("admin.socket", &[""]),
    ("admin.termination_log", &[""]),
    ("admin.last_exit_file", &[""]),
    ("admin.vllm_metrics", &["maybe"]),
    ("auth.keys_file", &[""]),
    ("auth.tenant_header", &["", "x y", "x:y"]),
    ("auth.open_metrics", &["maybe"]),
    ("auth.no_auth", &["maybe"]),
    ("limits.max_wait_seconds", &["0", "3601"]),
    ("limits.queue_requests", &["0", "many"]),
    ("limits.queue_tokens", &["0"]),
    ("limits.request_timeout_seconds", &["0", "-5"]),
    ("limits.max_choices", &["0", "129"]),
    ("limits.sse_ping_seconds", &["0", "3601"]),
    ("drain.grace_seconds", &["0", "86401", "30s"]),
    ("drain.linger_seconds", &["-1", "3601"]),
    ("scheduler.step_target_seconds", &["0", "1.1"]),
    ("scheduler.kv_bytes", &["1", "17TiB"]),
    ("device.kind", &["gpu", "CUDA", ""]),
    ("device.memory_limit", &["1", "1.5", "0.001", "120%", "%", "17TiB"]),
    ("device.stall_seconds", &["0", "never"]),
    ("device.share", &["0", "1.01", "half"]),
    ("device.deterministic", &["maybe"]),
    ("cost.device_hourly_usd", &["0", "-1", "$3"]),
    ("cost.price_file", &[""]),
    ("cpu.threads", &["0", "1025", "auto"]),
    ("models.roots", &[]),
    ("models.offline", &["never"]),
    ("models.hub_endpoint", &["nowhere", "ftp://hub", "https://", "https://me@hub"]),
    ("models.hub_token", &["", "two words"]),
    ("models.hub_cache", &[""]),
    ("models.ca_file", &[""]),
    ("models.verify", &["never"]),
    ("models.dir", &[""]),
    ("models.cache_dir", &[""]),
    ("log.format", &["xml"]),
    ("log.filter", &["=,=="]),
];

#[test]
fn every_setting_has_a_range_and_says_so() {
    for setting in settings::all() {
        let row = BAD.iter().find(|(key, _)| *key == setting.key);
        let (section, name) = setting.key.split_once('.').expect("section.name");
        for value in row.unwrap_or_else(|| panic!("no bad values for {}", setting.key)).1 {
            let toml = format!("[{section}]\n{name} = {value:?}");
            let error = refused(&toml, &[], &[]).to_string();
            assert!(error.contains("test.toml:2: ") && error.contains(setting.key), "{error}");
            assert!(error.contains("must be "), "{error}");
            for name in setting.env.iter().filter(|_| !value.is_empty()) {
                let error = refused("", &[], &[(name, value)]).to_string();
                let secret = setting.key == "models.hub_token";
                let shown = if secret { "(not shown)" } else { value };
                assert!(error.starts_with(&format!("{name}={shown:?} ")), "{error}");
            }
        }
        // What is shown can be set again, and is then shown the same.
        let mut config = Config::default();
        let shown = (setting.get)(&config);
        if !shown.is_empty() {
            (setting.set)(&mut config, &shown).expect("the default is allowed");
            assert_eq!((setting.get)(&config), shown);
        }
    }
}

#[test]
fn values_of_every_form_are_read() {
    let toml = "
        server = { host = [\"10.0.0.1\", \"[::]\"], port = 0x1F90, max_body_bytes = \"1.5MiB\" }
        [device]
        memory_limit = \"4GiB\"
        share = 0.25
        [models]
        roots = [\"/a\", \"/b c\"]
        offline = true
        [scheduler]
        kv_bytes = 268_435_456
        [log]
        format = \"json\"
    ";
    let words = ["--no-auth", "--admin-host", "localhost", "--threads", "2"];
    let config = with(toml, &words, &[("SCONCE_DEVICE_HOURLY_USD", "2.5")]).expect("valid");
    assert_eq!(super::values::join(&config.server.hosts, ","), "10.0.0.1,::");
    assert_eq!((config.server.port, config.server.max_body_bytes), (8080, 3 << 19));
    let limit = Some(MemoryLimit::Bytes(4 << 30));
    assert_eq!((config.device.memory_limit, config.device.share), (limit, 0.25));
    assert_eq!(config.models.roots, [Path::new("/a"), Path::new("/b c")]);
    assert!(config.models.offline && config.auth.no_auth);
    assert_eq!(config.scheduler.kv_bytes, Some(256 << 20));
    assert_eq!((config.cpu.threads, config.cost.device_hourly_usd), (Some(2), Some(2.5)));
    assert_eq!(config.log.json, Some(true));
    let shown = |key| config.values.iter().find(|one| one.key == key).expect("there").value.clone();
    assert_eq!(
        (shown("device.memory_limit"), shown("models.roots")),
        ("4GiB".into(), "/a:/b c".into())
    );
}

#[test]
fn a_memory_limit_is_bytes_or_a_part() {
    let limit = |text: &str| {
        let config = with("", &["--device-memory-limit", text], &[]).expect("valid");
        config.device.memory_limit.expect("set").bytes(80 << 30)
    };
    for part in ["0.25", "25%", "25 %"] {
        assert_eq!(limit(part), 20 << 30, "{part}");
    }
    assert_eq!((limit("1.0"), limit("100%")), (80 << 30, 80 << 30));
    assert_eq!((limit("1.5GiB"), limit("2097152")), (3 << 29, 2 << 20));
    let config = with("[device]\nmemory_limit = 1.0", &[], &[]).expect("valid");
    let shown = config.values.iter().find(|one| one.key == "device.memory_limit");
    assert_eq!(shown.expect("there").value, "1.0");
}

#[test]
fn every_flag_reaches_its_setting() {
    let given = [
        ("server.host", "--host", "::1"),
        ("server.port", "--port", "1"),
        ("admin.host", "--admin-host", "::1"),
        ("admin.port", "--admin-port", "2"),
        ("drain.grace_seconds", "--grace-seconds", "9"),
        ("models.dir", "--models-dir", "models"),
        ("models.cache_dir", "--cache-dir", "/c"),
        ("device.kind", "--device-kind", "cpu"),
        ("device.memory_limit", "--device-memory-limit", "1GiB"),
        ("device.share", "--device-share", "0.5"),
        ("cost.device_hourly_usd", "--device-hourly-usd", "3"),
        ("cpu.threads", "--threads", "4"),
        ("log.format", "--log-format", "text"),
        ("log.filter", "--log-filter", "debug"),
        ("auth.no_auth", "--no-auth", "true"),
        ("device.deterministic", "--deterministic", "true"),
        ("models.offline", "--offline", "true"),
    ];
    let words: Vec<&str> = given
        .iter()
        .flat_map(|(_, flag, value)| {
            [*flag, *value].into_iter().take(1 + usize::from(*value != "true"))
        })
        .collect();
    let config = with("", &words, &[]).expect("valid");
    for (key, flag, value) in given {
        let found = config.values.iter().find(|one| one.key == key).expect("a setting");
        assert_eq!((found.value.as_str(), &found.source), (value, &Source::Flag(flag)), "{key}");
    }
    let error = refused("", &["--port", "http"], &[]);
    assert_eq!((error.fault(), error.exit_code()), (Fault::Usage, 64));
    assert!(error.to_string().starts_with("--port \"http\" "), "{error}");
}

#[test]
fn a_price_may_come_from_a_file() {
    assert!(!with("", &[], &[]).expect("valid").cost.has_price());
    let config = with("[cost]\nprice_file = \"p\"", &[], &[]).expect("valid");
    assert_eq!(config.cost.price_file, Some("p".into()));
    assert!(config.cost.has_price());
}

#[test]
fn an_open_bind_needs_no_auth() {
    for (flag, section) in [("--host", "server.host"), ("--admin-host", "admin.host")] {
        for address in ["0.0.0.0", "::", "127.0.0.1,10.1.2.3"] {
            let error = refused("", &[flag, address], &[]).to_string();
            assert!(error.contains(section) && error.contains("--no-auth"), "{error}");
            with("", &[flag, address, "--no-auth"], &[]).expect("asked for");
            with("", &[flag, address], &[("SCONCE_NO_AUTH", "1")]).expect("asked for");
        }
        with("", &[flag, "127.0.0.9"], &[]).expect("all of 127/8 is loopback");
    }
    // Keys guard as well; both together say two things.
    let keys = [("SCONCE_KEYS_FILE", "/keys")];
    with("", &["--host", "::"], &keys).expect("guarded");
    let error = refused("", &["--no-auth"], &keys).to_string();
    assert!(error.contains("auth.no_auth") && error.contains("auth.keys_file"), "{error}");
    let error = refused("", &["--port", "7000", "--admin-port", "7000"], &[]).to_string();
    assert!(error.contains("both 7000"), "{error}");
    with("", &["--port", "0", "--admin-port", "0"], &[]).expect("two free ports differ");
}

#[test]
fn a_file_that_cannot_be_read_is_named() {
    let missing = flags(&["--config", "/nonexistent/x.toml"]);
    let error = load(&missing, &Environment::default()).expect_err("missing");
    assert_eq!(error.exit_code(), 66);
    assert!(
        error.to_string().contains("/nonexistent/x.toml") && error.to_string().contains("--config")
    );
    let env = Environment::of(&[("SCONCE_CONFIG", "/nonexistent/y.toml")]);
    let error = load(&Flags::default(), &env).expect_err("missing").to_string();
    assert!(error.contains("y.toml") && error.contains("SCONCE_CONFIG"), "{error}");
    let error = refused("[server]\nport = 1\nport = 2", &[], &[]).to_string();
    assert!(error.contains("test.toml:3: not valid TOML"), "{error}");
    let error = refused("[server\n", &[], &[]).to_string();
    assert!(error.contains("test.toml:1: not valid TOML"), "{error}");
    refused("[server]\nhost = [{}]", &[], &[]);
}

#[test]
fn damaged_text_never_panics() {
    let whole = fs::read_to_string("models/all-minilm-l6-v2.toml").expect("ships with the source");
    let mut state = 1_u64;
    let mut random = |below: usize| {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % below
    };
    for _ in 0..300 {
        let mut bytes = whole.clone().into_bytes();
        for _ in 0..=random(3) {
            let at = random(bytes.len());
            bytes[at] = b"\"[]{}=#\n9-.\\x"[random(13)];
        }
        bytes.truncate(random(bytes.len()) + 1);
        let text = String::from_utf8_lossy(&bytes);
        let _ = manifest::parse(Path::new("m.toml"), &text);
        let _ = super::document::entries(&text);
    }
}

#[test]
fn the_hash_follows_the_values_not_their_source() {
    let hash = |toml: &str, words: &[&str]| {
        let words: Vec<&str> = words.iter().chain(&["--cache-dir", "/c"]).copied().collect();
        with(toml, &words, &[("HF_HUB_CACHE", "/h")]).expect("valid").hash()
    };
    let plain = hash("", &[]);
    assert!(plain.len() == 12 && plain.chars().all(|c| c.is_ascii_hexdigit()), "{plain}");
    assert_eq!(plain, hash("[server]\nport = 8080", &[]));
    assert_eq!(hash("[server]\nport = 81", &[]), hash("", &["--port", "81"]));
    assert_ne!(plain, hash("", &["--port", "81"]));
    let mut config = with("", &["--cache-dir", "/c"], &[("HF_HUB_CACHE", "/h")]).expect("valid");
    assert_eq!(config.hash(), plain);
    config.manifests[0].weight = 2.0;
    assert_ne!(config.hash(), plain);
}

#[test]
fn the_cache_folder_can_always_be_written_to() {
    let dir = tempfile::tempdir().expect("a folder");
    let at = |name: &str| dir.path().join(name).to_string_lossy().into_owned();
    let temporary = at("tmp");
    fs::create_dir(&temporary).expect("a folder");
    let choose = |variables: &[(&str, &str)]| {
        let tmp = [("TMPDIR", temporary.as_str())];
        let all: Vec<_> = tmp.iter().chain(variables).copied().collect();
        cache::default_dir(&Environment::of(&all))
    };
    let (xdg, home) = (at("xdg"), at("home"));
    let both = choose(&[("XDG_CACHE_HOME", &xdg), ("HOME", &home)]).expect("a folder");
    assert_eq!(both, Path::new(&xdg).join("sconce"));
    assert_eq!(
        choose(&[("HOME", &home)]).expect("a folder"),
        Path::new(&home).join(".cache/sconce")
    );
    for unusable in [None, Some(("HOME", "/proc/none")), Some(("XDG_CACHE_HOME", "relative"))] {
        let found = choose(unusable.as_slice()).expect("a folder");
        assert_eq!(found.parent(), Some(Path::new(&temporary)), "{unusable:?}");
        assert!(found.is_dir());
    }
    // A folder that somebody else could have filled is not used.
    let planted: PathBuf = choose(&[]).expect("a folder");
    let open = std::os::unix::fs::PermissionsExt::from_mode(0o777);
    fs::set_permissions(planted, open).expect("permissions");
    assert_eq!(choose(&[]).expect_err("refused").exit_code(), 73);
}
