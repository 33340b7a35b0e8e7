//! How much memory there is: the machine's, or the container's where that is less.

use std::fs;

/// Bytes that this process may use at most; none if the system does not say.
pub fn total() -> Option<u64> {
    let machine = meminfo("MemTotal:")?;
    Some(cgroup_limit().map_or(machine, |limit| machine.min(limit)))
}

/// Bytes that can still be had without pushing others out; none if the system does not say.
pub fn available() -> Option<u64> {
    let machine = meminfo("MemAvailable:")?;
    let left = cgroup_limit().map(|limit| limit.saturating_sub(cgroup_use().unwrap_or(0)));
    Some(left.map_or(machine, |left| machine.min(left)))
}

fn meminfo(key: &str) -> Option<u64> {
    parse_meminfo(&fs::read_to_string("/proc/meminfo").ok()?, key)
}

/// A line is `MemTotal:       24657456 kB`.
fn parse_meminfo(text: &str, key: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(key))?;
    let kibibytes: u64 = line.trim().trim_end_matches("kB").trim().parse().ok()?;
    Some(kibibytes * 1024)
}

/// The limit of the control group (version 2, then 1); `max` and absurdly large are no limit.
fn cgroup_limit() -> Option<u64> {
    let files = ["/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"];
    let limit = files.iter().find_map(|file| number(file))?;
    (limit < 1 << 60).then_some(limit)
}

/// What the control group holds, without what the system would give back: cached file pages, of
/// which reading a model leaves as many as its weights.
fn cgroup_use() -> Option<u64> {
    let files = ["/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory/memory.usage_in_bytes"];
    let stats = ["/sys/fs/cgroup/memory.stat", "/sys/fs/cgroup/memory/memory.stat"];
    let used = files.iter().find_map(|file| number(file))?;
    let stat = stats.iter().find_map(|file| fs::read_to_string(file).ok()).unwrap_or_default();
    Some(used.saturating_sub(cached(&stat)))
}

/// Bytes of cached file pages in a `memory.stat`.
fn cached(stat: &str) -> u64 {
    let value = |key: &str| -> u64 {
        let line = stat.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(' '));
        line.and_then(|value| value.trim().parse().ok()).unwrap_or(0)
    };
    value("inactive_file") + value("active_file")
}

fn number(file: &str) -> Option<u64> {
    fs::read_to_string(file).ok()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn meminfo_is_in_kibibytes() {
        let text = "MemTotal:       24657456 kB\nMemFree:  1 kB\nMemAvailable:   23000000 kB\n";
        assert_eq!(parse_meminfo(text, "MemTotal:"), Some(24_657_456 * 1024));
        assert_eq!(parse_meminfo(text, "Missing:"), None);
    }

    #[test]
    fn cached_file_pages_are_not_in_use() {
        let stat = "anon 5\nfile 90\nactive_file 30\ninactive_file 40\nslab 7\n";
        assert_eq!(cached(stat), 70);
        assert_eq!(cached(""), 0);
    }

    #[test]
    fn this_machine_has_memory() {
        let total = total().expect("Linux says");
        assert!(total > 1 << 20 && available().expect("Linux says") <= total);
    }
}
