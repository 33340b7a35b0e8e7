//! The plan as a person reads it: aligned, with units, what was assumed at the end.

use std::fmt::Write;

use super::report::{Group, Report};

/// Most devices in the list of those that would do.
const LISTED_MAX: usize = 12;

/// Rows of cells; the first row is the head. Columns but the first are aligned to the right,
/// unless a cell is long.
struct Grid {
    rows: Vec<Vec<String>>,
    left: usize,
}

impl Grid {
    /// With `left` columns aligned to the left.
    fn new(left: usize, head: &[&str]) -> Self {
        Self { rows: vec![head.iter().map(|cell| (*cell).to_owned()).collect()], left }
    }

    fn row(&mut self, cells: Vec<String>) {
        self.rows.push(cells);
    }

    fn print(&self, text: &mut String) {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let width = |column: usize| {
            let cells = self.rows.iter().filter_map(|row| row.get(column));
            cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
        };
        for row in &self.rows {
            let mut line = String::from(" ");
            for column in 0..columns {
                let cell = row.get(column).map_or("", String::as_str);
                let pad = " ".repeat(width(column).saturating_sub(cell.chars().count()));
                match column < self.left {
                    true => line.extend([" ", cell, &pad, " "]),
                    false => line.extend([" ", &pad, cell, " "]),
                }
            }
            text.push_str(line.trim_end());
            text.push('\n');
        }
    }
}

/// The whole plan as text.
pub(super) fn render(report: &Report) -> String {
    let mut text = format!("{}\n\n", report.headline);
    models(report, &mut text);
    for group in &report.groups {
        text.push('\n');
        section(group, &mut text);
    }
    text.push('\n');
    together(report, &mut text);
    observed(report, &mut text);
    list("Warnings", &report.warnings, &mut text);
    list("Notes", &report.notes, &mut text);
    assumptions(report, &mut text);
    text
}

fn models(report: &Report, text: &mut String) {
    text.push_str("Models\n");
    let mut grid =
        Grid::new(4, &["name", "task", "from", "format", "parameters", "weights", "KV a token"]);
    for model in &report.models {
        grid.row(vec![
            model.name.clone(),
            model.task.into(),
            model.from.into(),
            model.format.clone(),
            format!("{:.2} M", model.parameters as f64 / 1e6),
            bytes(model.weight_bytes),
            match model.kv_bytes_per_token {
                0 => "-".into(),
                some => format!("{some} B"),
            },
        ]);
    }
    grid.print(text);
}

fn section(group: &Group, text: &mut String) {
    let Group { device, instance, .. } = group;
    let _ = writeln!(text, "{} on {device} ({instance})", group.models.join(" + "));
    memory(group, text);
    text.push('\n');
    speed(group, text);
    text.push('\n');
    pod(group, text);
}

fn memory(group: &Group, text: &mut String) {
    let memory = &group.memory;
    let mut grid = Grid::new(1, &["memory", "bytes", ""]);
    for (model, part) in group.models.iter().zip(&memory.parts) {
        grid.row(vec![format!("weights {model}"), bytes(part.weights)]);
    }
    let kv = format!("of it {} guaranteed", bytes(memory.kv_guaranteed));
    let rows = match group.pod.resource {
        Some(_) => vec![
            ("workspace", memory.workspace, "the largest model's"),
            ("KV cache", memory.kv, kv.as_str()),
            ("not given to anything", memory.spare, ""),
            ("= device.memory_limit", memory.limit, ""),
            ("CUDA context", memory.process, "once, not for each model"),
            ("headroom", memory.headroom, ""),
            ("= usable", memory.usable, ""),
        ],
        None => host_rows(group, &kv),
    };
    for (name, value, note) in rows {
        if value > 0 || name.starts_with('=') {
            grid.row(vec![name.into(), bytes(value), note.into()]);
        }
    }
    grid.print(text);
}

/// On a CPU the models' memory is the pod's: it asks for what they need, not for the node.
fn host_rows<'a>(group: &Group, kv: &'a str) -> Vec<(&'static str, u64, &'a str)> {
    let (memory, pod) = (&group.memory, &group.pod);
    let ledger = memory.weights + memory.workspace + memory.kv;
    vec![
        ("workspace", memory.workspace, "the largest model's"),
        ("KV cache", memory.kv, kv),
        ("= device.memory_limit", ledger, ""),
        ("the process", pod.memory_need.saturating_sub(ledger), "once, not for each model"),
        ("30 %", pod.memory.saturating_sub(pod.memory_need), ""),
        ("= the pod's request", pod.memory, ""),
        ("left on the node", memory.usable.saturating_sub(pod.memory), ""),
    ]
}

fn speed(group: &Group, text: &mut String) {
    let head =
        ["speed (guessed)", "step", "prompt", "KV tokens", "streams", "mean, full", "p95, full"];
    let mut grid = Grid::new(1, &head);
    for (line, part) in group.speed.iter().zip(&group.memory.parts) {
        let seconds = |of: fn(&super::speed::Lane) -> f64| {
            line.full.as_ref().map_or_else(|| "-".into(), |lane| time(of(lane)))
        };
        let or_dash = |value: u64| if value == 0 { "-".into() } else { value.to_string() };
        grid.row(vec![
            line.model.clone(),
            if line.decode_step_ms > 0.0 { time(line.decode_step_ms / 1e3) } else { "-".into() },
            time(line.prefill_ms / 1e3),
            or_dash(part.kv_tokens),
            or_dash(part.streams),
            seconds(|lane| lane.mean_seconds),
            seconds(|lane| lane.p95_seconds),
        ]);
    }
    grid.print(text);
}

fn pod(group: &Group, text: &mut String) {
    let pod = &group.pod;
    let mut grid = Grid::new(3, &["pod", "", ""]);
    let mut row = |name: &str, value: String, note: String| {
        grid.row(vec![name.into(), value, note]);
    };
    match &pod.resource {
        Some(resource) => row("GPU", resource.clone(), "request = limit, 1".into()),
        None => row("GPU", "none".into(), "the node's processors compute".into()),
    }
    row("CPU", format!("{}m", pod.cpu_m), "request, no limit".into());
    row(
        "memory",
        bytes(pod.memory),
        format!("request = limit: {} and 30 %", bytes(pod.memory_need)),
    );
    let cache = format!("request = limit, of it {} model cache", bytes(pod.cache));
    row("ephemeral storage", bytes(pod.storage), cache);
    row("grace", format!("{} s", pod.grace_seconds), "terminationGracePeriodSeconds".into());
    let carries = group.carries.map_or_else(String::new, |scale| {
        format!("each carries {scale:.2} × the load at its limit")
    });
    row("replicas", format!("{} to {}", group.replicas_paid, pod.replicas_max), carries);
    row("KEDA queue", pod.queue_threshold.to_string(), "waiting requests a replica".into());
    row(
        "KEDA in flight",
        pod.in_flight_threshold.to_string(),
        format!("0.75 × {:.1}, {}", pod.concurrency, pod.thresholds),
    );
    let cold = &pod.cold_start;
    row(
        "cold start",
        format!("{:.0} s", cold.cold()),
        format!(
            "node {:.0}, image {:.0}, fetch {:.0}, load {:.1}, warm {:.0}; {:.1} s where all is \
             on disk",
            cold.node,
            cold.image,
            cold.fetch,
            cold.load,
            cold.warm,
            cold.warm_node()
        ),
    );
    let on_demand = format!(
        "{} × {:.4} USD an hour, {}",
        group.replicas, group.usd_per_hour, group.price_as_of
    );
    row("on demand", format!("{:.2} USD", group.usd_per_month), format!("a month: {on_demand}"));
    match (group.spot_usd_per_month, group.spot_usd_per_hour) {
        (Some(month), Some(hour)) => {
            let count = group.replicas + 1;
            let note = format!("a month: {count} × {hour:.4} USD an hour, one more than needed");
            row("on spot", format!("{month:.2} USD"), note);
        }
        _ => row("on spot", "unknown".into(), "--spot-discount or -f FILE gives prices".into()),
    }
    grid.print(text);
}

fn together(report: &Report, text: &mut String) {
    text.push_str("All models together\n");
    let head = ["device", "instance", "KV cache", "replicas", "USD a month", "on spot"];
    let mut grid = Grid::new(2, &head);
    // One line for each kind: its machines differ little.
    let mut small: Vec<(&str, String)> = Vec::new();
    let mut fits = 0;
    for it in &report.together {
        let usd = |cost: Option<f64>| cost.map_or_else(|| "-".into(), |cost| format!("{cost:.0}"));
        fits += usize::from(it.why_not.is_none());
        match &it.why_not {
            None if fits > LISTED_MAX => {}
            None => grid.row(vec![
                it.device.clone(),
                it.instance.clone(),
                bytes(it.kv_bytes),
                it.replicas.to_string(),
                usd(it.usd_per_month),
                usd(it.spot_usd_per_month),
            ]),
            Some(why) if !small.iter().any(|(device, _)| *device == it.device) => {
                small.push((it.device.as_str(), format!("{} ({}): {why}", it.device, it.instance)));
            }
            Some(_) => {}
        }
    }
    grid.print(text);
    if fits > LISTED_MAX {
        let _ = writeln!(text, "  and {} more for more money (-o json)", fits - LISTED_MAX);
    }
    let small: Vec<String> = small.into_iter().map(|(_, line)| line).collect();
    list("Not on", &small, text);
}

fn observed(report: &Report, text: &mut String) {
    if report.observed.is_empty() {
        return;
    }
    text.push_str("\nThe running server\n");
    let mut grid = Grid::new(4, &["", "observed", "planned", "so"]);
    for it in &report.observed {
        let cells = [&it.what, &it.observed, &it.planned, &it.advice];
        grid.row(cells.map(Clone::clone).to_vec());
    }
    grid.print(text);
}

fn list(title: &str, lines: &[String], text: &mut String) {
    if !lines.is_empty() {
        let _ = writeln!(text, "\n{title}");
        for line in lines {
            let _ = writeln!(text, "  - {line}");
        }
    }
}

fn assumptions(report: &Report, text: &mut String) {
    let it = &report.assumptions;
    let lines = [
        "weights stay as in their files on a GPU; on a CPU as its kernels pack them".into(),
        "KV is 16 bits a value; activations are 32 bits; a step has at most 512 rows, or one whole \
         input of an encoder"
            .into(),
        format!(
            "steps by the roofline: {:.0} % of the bandwidth, {:.0} % of the dense bf16 rate, \
             {:.1} ms besides; nothing here was measured on the device",
            it.bandwidth_efficiency * 100.0,
            it.flops_efficiency * 100.0,
            it.step_overhead_us / 1e3
        ),
        format!(
            "p95 = {} × mean of answers, {} × of encoder requests; a replica is planned for {:.0} \
             % of what it carries",
            it.p95_generate,
            it.p95_encode,
            it.load_target * 100.0
        ),
        format!(
            "a CUDA context takes {} MiB, a process {} MiB of host memory ({} more with CUDA) and \
             {} a model",
            it.context_mib, it.host_mib, it.host_cuda_mib, it.host_model_mib
        ),
        format!("a month has {} hours; prices are us-east-1 lists of their dates", it.hours),
        format!(
            "images of {} MiB come at {} MiB/s, weights at {} MiB/s, from disk at {} MiB/s",
            it.image_mib, it.pull_mib_s, it.fetch_mib_s, it.disk_mib_s
        ),
    ];
    list("Assumed (-f FILE changes these)", &lines, text);
}

/// Bytes for people.
fn bytes(bytes: u64) -> String {
    const MIB: f64 = 1_048_576.0;
    let mib = bytes as f64 / MIB;
    if mib >= 1024.0 { format!("{:.2} GiB", mib / 1024.0) } else { format!("{mib:.1} MiB") }
}

/// Seconds for people.
fn time(seconds: f64) -> String {
    if seconds >= 1.0 { format!("{seconds:.2} s") } else { format!("{:.2} ms", seconds * 1e3) }
}
