//! Text to values and back, each with its range. An `Err` says what is allowed; the caller knows
//! which key it was and where it stood.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ops::RangeInclusive;
use std::time::Duration;

use super::{DeviceKind, MemoryLimit};

/// A parsed value, or what would be allowed.
pub(crate) type Parsed<T> = Result<T, String>;

const UNITS: [(&str, u64); 8] = [
    ("KiB", 1 << 10),
    ("MiB", 1 << 20),
    ("GiB", 1 << 30),
    ("TiB", 1 << 40),
    ("kB", 1_000),
    ("MB", 1_000_000),
    ("GB", 1_000_000_000),
    ("TB", 1_000_000_000_000),
];

/// A whole number in `range`.
pub(super) fn whole(text: &str, range: RangeInclusive<u64>) -> Parsed<u64> {
    let parsed = text.replace('_', "").parse().ok().filter(|value| range.contains(value));
    parsed.ok_or_else(|| format!("a whole number from {} to {}", range.start(), range.end()))
}

/// A number of things that fit in memory, in `range`.
pub(super) fn count(text: &str, range: RangeInclusive<u64>) -> Parsed<usize> {
    whole(text, range).map(|value| value as usize)
}

/// A TCP port; 0 lets the system choose.
pub(super) fn port(text: &str) -> Parsed<u16> {
    text.parse().map_err(|_| "a port from 0 to 65535 (0: the system chooses)".into())
}

/// A number in `range`.
pub(super) fn number(text: &str, range: RangeInclusive<f64>) -> Parsed<f64> {
    let parsed = text.parse().ok().filter(|value| range.contains(value));
    parsed.ok_or_else(|| format!("a number from {} to {}", range.start(), range.end()))
}

/// A duration in seconds, fractions allowed, in `range`.
pub(super) fn seconds(text: &str, range: RangeInclusive<f64>) -> Parsed<Duration> {
    let allowed = || format!("seconds from {} to {}", range.start(), range.end());
    number(text, range.clone()).map(Duration::from_secs_f64).map_err(|_| allowed())
}

/// Bytes in `range`, as a plain number or with a unit: `4GiB`, `512 MiB`, `1.5GB`.
pub(crate) fn size(text: &str, range: RangeInclusive<u64>) -> Parsed<u64> {
    let parsed = bytes(text).filter(|value| range.contains(value));
    parsed.ok_or_else(|| {
        let (from, to) = (show_size(*range.start()), show_size(*range.end()));
        format!("bytes from {from} to {to}, as a number or with KiB, MiB, GiB, TiB, kB, MB, GB, TB")
    })
}

fn bytes(text: &str) -> Option<u64> {
    let text = text.trim();
    let unit = UNITS.iter().find(|(unit, _)| text.ends_with(unit));
    let Some((unit, factor)) = unit else { return text.replace('_', "").parse().ok() };
    let number = text[..text.len() - unit.len()].trim_end();
    if let Ok(whole) = number.parse::<u64>() {
        return whole.checked_mul(*factor);
    }
    let product = number.parse::<f64>().ok()? * *factor as f64;
    (product >= 0.0 && product < u64::MAX as f64).then_some(product as u64)
}

/// Bytes in `range`, or a part of the whole: `0.45`, `45%`.
pub(super) fn memory(text: &str, range: RangeInclusive<u64>) -> Parsed<MemoryLimit> {
    let text = text.trim();
    let part = match text.strip_suffix('%') {
        Some(percent) => percent.trim().parse::<f64>().ok().map(|percent| percent / 100.0),
        // A number without a point and a unit counts bytes.
        None => text.contains('.').then(|| text.parse::<f64>().ok()).flatten(),
    };
    match part {
        Some(part) if (0.01..=1.0).contains(&part) => Ok(MemoryLimit::Part(part)),
        Some(_) => Err("a part from 0.01 to 1.0, or from 1% to 100%, or bytes, as 4GiB".into()),
        None => size(text, range).map(MemoryLimit::Bytes).map_err(|allowed| {
            format!("{allowed}, or a part of the device's memory, as 0.45 or 45%")
        }),
    }
}

/// As [`memory`] reads it.
pub(super) fn show_memory(limit: MemoryLimit) -> String {
    match limit {
        MemoryLimit::Bytes(bytes) => show_size(bytes),
        // With a point, also where the part is whole.
        MemoryLimit::Part(part) => format!("{part:?}"),
    }
}

/// Bytes in the largest unit that leaves no rest.
pub(super) fn show_size(bytes: u64) -> String {
    let unit =
        UNITS[..4].iter().rev().find(|(_, size)| bytes >= *size && bytes.is_multiple_of(*size));
    unit.map_or_else(|| bytes.to_string(), |(name, size)| format!("{}{name}", bytes / size))
}

/// What computes.
pub(super) fn device(text: &str) -> Parsed<DeviceKind> {
    let kinds = [DeviceKind::Auto, DeviceKind::Cpu, DeviceKind::Cuda];
    let named = kinds.into_iter().find(|kind| show_device(*kind) == text);
    named.ok_or_else(|| "auto, cpu or cuda".into())
}

/// Its word.
pub(super) fn show_device(kind: DeviceKind) -> &'static str {
    match kind {
        DeviceKind::Auto => "auto",
        DeviceKind::Cpu => "cpu",
        DeviceKind::Cuda => "cuda",
    }
}

/// `true` or `false`, and what other tools take for these.
pub(super) fn switch(text: &str) -> Parsed<bool> {
    match text.to_ascii_lowercase().as_str() {
        "true" | "1" | "yes" | "on" => Ok(true),
        "false" | "0" | "no" | "off" => Ok(false),
        _ => Err("true or false".into()),
    }
}

/// Addresses to bind: one or more, separated by commas; `localhost` is both loopbacks.
pub(super) fn hosts(text: &str) -> Parsed<Vec<IpAddr>> {
    let mut hosts = Vec::new();
    for part in text.split([',', '\n']).map(str::trim) {
        let bare = part.strip_prefix('[').and_then(|part| part.strip_suffix(']')).unwrap_or(part);
        let found = match bare.parse() {
            Ok(address) => vec![address],
            Err(_) if bare == "localhost" => loopback(),
            Err(_) => {
                let allowed = "IP addresses separated by commas, or localhost (0.0.0.0 or :: for \
                               every interface)";
                return Err(allowed.into());
            }
        };
        for address in found {
            if !hosts.contains(&address) {
                hosts.push(address);
            }
        }
    }
    Ok(hosts)
}

/// Both loopback addresses.
pub(super) fn loopback() -> Vec<IpAddr> {
    vec![Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()]
}

/// A path that is not empty.
pub(super) fn path(text: &str) -> Parsed<std::path::PathBuf> {
    if text.is_empty() { Err("a path".into()) } else { Ok(text.into()) }
}

/// The address of a service; a path may follow.
pub(super) fn endpoint(text: &str) -> Parsed<String> {
    let rest = text.strip_prefix("https://").or_else(|| text.strip_prefix("http://"));
    let plain = |rest: &&str| !rest.is_empty() && rest.chars().all(|c| c.is_ascii_graphic());
    let valid = rest.filter(plain).is_some_and(|rest| !rest.contains(['@', '?', '#']));
    if valid { Ok(text.to_owned()) } else { Err("an address as https://HOST".into()) }
}

/// Something that goes into a header and nowhere else.
pub(super) fn secret(text: &str) -> Parsed<String> {
    let valid = !text.is_empty() && text.chars().all(|c| c.is_ascii_graphic());
    if valid { Ok(text.to_owned()) } else { Err("visible ASCII characters".into()) }
}

/// The name of an HTTP header, in lower case.
pub(super) fn header(text: &str) -> Parsed<String> {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"-_".contains(&byte);
    match (1..=64).contains(&text.len()) && text.bytes().all(allowed) {
        true => Ok(text.to_ascii_lowercase()),
        false => Err("a header's name: up to 64 letters, digits, - and _".into()),
    }
}

/// Items joined by `separator`.
pub(super) fn join<T: ToString>(items: &[T], separator: &str) -> String {
    items.iter().map(ToString::to_string).collect::<Vec<_>>().join(separator)
}

/// The candidate that `name` was most likely meant to be, if one is close.
pub(crate) fn nearest<'a>(
    name: &str,
    candidates: impl IntoIterator<Item = &'a str>,
) -> Option<&'a str> {
    let scored = candidates.into_iter().map(|candidate| (distance(name, candidate), candidate));
    let (distance, best) = scored.min()?;
    (distance <= best.len().div_ceil(3)).then_some(best)
}

/// Levenshtein distance.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, left) in a.chars().take(128).enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, right) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(left != *right);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}
