//! The command line that would ask the same again, for the head of what it wrote.

use super::Args;

/// As a person would type it: only what differs from the defaults.
pub(super) fn line(args: &Args) -> String {
    let mut words = vec!["sconce plan".to_owned()];
    words.extend(args.models.iter().cloned());
    let files = args.files.iter().map(|file| file.display().to_string());
    let lists = [
        ("--device", args.devices.clone()),
        ("-f", files.collect()),
        ("--load", args.loads.clone()),
        ("--component", args.components.clone()),
    ];
    for (flag, values) in lists {
        words.extend(values.iter().map(|value| format!("{flag} {value}")));
    }
    let number = |value: Option<f64>| value.map(|value| value.to_string());
    let whole = |value: Option<u32>| value.map(|value| value.to_string());
    let unless = |value: &str, default: &str| (value != default).then(|| value.to_owned());
    let values = [
        ("--dtype", args.dtype.clone()),
        ("--spot-discount", number(args.spot_discount)),
        ("--time-slicing", unless(&args.time_slicing.to_string(), "1")),
        ("--daemonset-cpu", unless(&args.daemonset_cpu.to_string(), "200")),
        ("--daemonset-memory", unless(&args.daemonset_memory, "512MiB")),
        ("--node-storage", args.node_storage.clone()),
        ("--kv", args.kv.clone()),
        ("--cpu", whole(args.cpu)),
        ("--memory", args.memory.clone()),
        ("--storage", args.storage.clone()),
        ("--grace", whole(args.grace)),
        ("--max-replicas", whole(args.max_replicas)),
        ("--concurrency", number(args.concurrency)),
        ("--base", unless(&args.base, "../../base")),
        ("--image", args.image.clone()),
    ];
    let given = values.into_iter().filter_map(|(flag, value)| Some(format!("{flag} {}", value?)));
    words.extend(given);
    if args.spot {
        words.push("--spot".into());
    }
    words.push("-o kustomize".into());
    // It becomes a comment: nothing in it may end that.
    words.join(" ").replace(char::is_control, " ")
}
