//! The arithmetic against published numbers, and what must hold whatever the numbers are.

use std::path::PathBuf;

use super::choose::{Terms, place};
use super::devices::{Device, Table};
use super::fit::{Fit, Room, Wanted};
use super::load::{self, Load};
use super::model::Model;
use super::pod::ByHand;
use super::speed::Speed;
use super::{Args, run};
use crate::config::Config;

const TRIO: [&str; 3] =
    ["shape:llama-3.1-8b", "shape:bge-large-en-v1.5", "shape:bge-reranker-v2-m3"];

fn table() -> Table {
    Table::read(&[], None).expect("the built-in table")
}

fn terms() -> Terms {
    let room = Room {
        assumed: table().assumptions().expect("the built-in assumptions"),
        daemonset_cpu_m: 200,
        daemonset_bytes: 512 << 20,
        kv_bytes: None,
        storage_bytes: None,
    };
    Terms { room, by_hand: ByHand::default(), spot: false }
}

fn models(names: &[&str]) -> Vec<Model> {
    let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
    Model::all(&Config::default(), &names, None).expect("known shapes")
}

fn device(name: &str) -> Device {
    let mut found = table().devices(&[name.to_owned()], 1).expect("a known device");
    found.remove(0)
}

fn loads(models: &[Model], texts: &[&str]) -> Vec<Load> {
    let texts: Vec<String> = texts.iter().map(|text| (*text).to_owned()).collect();
    let assumed = terms().room.assumed;
    load::complete(models, &texts, &assumed).expect("sound loads").0
}

fn wanted<'a>(models: &'a [Model], loads: &[Load]) -> Vec<Wanted<'a>> {
    models.iter().zip(loads).map(|(model, load)| Wanted { model, load: *load }).collect()
}

fn plan(arguments: &[&str]) -> Result<String, (u8, String)> {
    #[derive(clap::Parser)]
    struct Line {
        #[command(flatten)]
        args: Args,
    }
    let line = std::iter::once("plan").chain(arguments.iter().copied());
    let args = <Line as clap::Parser>::try_parse_from(line).expect("a command line").args;
    let mut out = Vec::new();
    match run(&Config::default(), &args, &mut out) {
        Ok(()) => Ok(String::from_utf8(out).expect("text")),
        Err(error) => Err((error.exit_code(), error.to_string())),
    }
}

/// Parameters as the models' own pages and headers give them; KV by 2 × layers × heads × size × 2.
#[test]
fn parameters_and_kv_are_the_published_ones() {
    let cases = [
        ("llama-3.1-8b", 8_030_261_248, 131_072),
        ("llama-3.1-70b", 70_553_706_496, 327_680),
        ("llama-3.2-1b", 1_235_814_400, 32_768),
        ("mistral-7b", 7_248_023_552, 131_072),
        ("qwen2.5-0.5b", 494_032_768, 12_288),
        ("qwen2.5-7b", 7_615_616_512, 57_344),
        ("qwen3-0.6b", 596_049_920, 114_688),
        ("all-minilm-l6-v2", 22_713_216, 0),
        ("bge-large-en-v1.5", 335_141_888, 0),
        ("bge-reranker-v2-m3", 567_755_777, 0),
    ];
    for (name, parameters, kv) in cases {
        let model = models(&[&format!("shape:{name}")]).remove(0);
        assert_eq!(model.weights.params, parameters, "{name}");
        assert_eq!(model.shape.kv().map_or(0, |kv| kv.token_bytes()), kv, "{name}");
    }
}

#[test]
fn formats_take_the_bits_they_take() {
    let bytes = |dtype: &str| models(&[&format!("shape:llama-3.1-8b@{dtype}")])[0].weights.total;
    assert_eq!(bytes("f32"), 8_030_261_248 * 4);
    assert_eq!(bytes("f16"), 8_030_261_248 * 2);
    assert_eq!(bytes("q8_0"), 8_030_261_248_u64.div_ceil(32) * 34);
    assert_eq!(bytes("q6_k"), 8_030_261_248_u64.div_ceil(256) * 210);
    assert_eq!(bytes("q4_0"), 8_030_261_248_u64.div_ceil(32) * 18);
}

/// A CPU packs weights in another form, never in a much smaller one.
#[test]
fn every_format_takes_memory_on_a_cpu() {
    for dtype in ["f32", "bf16", "q8_0", "q6_k", "q5_k", "q5_0", "q4_k", "q4_0", "q4_1"] {
        let weights = models(&[&format!("shape:llama-3.2-1b@{dtype}")]).remove(0).weights;
        let ratio = weights.cpu as f64 / weights.total as f64;
        assert!((0.9..2.5).contains(&ratio), "{dtype}: {ratio}");
    }
}

#[test]
fn slices_have_the_memory_that_they_really_have() {
    let slice = device("mig:1g.10gb@a100-80");
    assert!((9.5..=9.75).contains(&(slice.memory as f64 / f64::from(1 << 30))), "{slice:?}");
    assert_eq!(slice.per_node, 56);
    assert!((slice.share - 1.0 / 7.0).abs() < 1e-12);
    assert!((slice.bandwidth - 2039e9 / 8.0).abs() < 1.0);
    let small = device("mig:1g.18gb@h200");
    assert_eq!(small.memory, 16 << 30, "not 18");
}

/// Whatever is planned, memory adds up to what there is.
#[test]
fn sums_equal_the_total() {
    let sets: [&[&str]; 4] = [&TRIO, &TRIO[1..], &["shape:qwen2.5-0.5b"], &["shape:llama-3.2-1b"]];
    let names = ["l4", "a10g", "a100-40", "h100", "mig:1g.10gb@a100-80", "m7i.2xlarge"];
    let mut seen = 0;
    for set in sets {
        let models = models(set);
        let wanted = wanted(&models, &loads(&models, &[]));
        for name in names {
            let Ok(fit) = Fit::of(&wanted, &device(name), &terms().room) else { continue };
            seen += 1;
            assert_eq!(fit.weights, fit.parts.iter().map(|part| part.weights).sum::<u64>());
            assert_eq!(fit.weights + fit.workspace + fit.kv + fit.spare, fit.limit, "{name}");
            assert_eq!(fit.process + fit.limit + fit.headroom, fit.usable, "{name}");
            assert!(fit.kv >= fit.kv_guaranteed);
        }
    }
    assert!(seen >= 15, "{seen} fits");
}

#[test]
fn another_model_never_lowers_the_need() {
    let all = models(&["shape:qwen2.5-0.5b", TRIO[1], TRIO[2], "shape:llama-3.2-1b"]);
    let wanted = wanted(&all, &loads(&all, &[]));
    for name in ["l4", "h200", "m7i.2xlarge"] {
        let device = device(name);
        let (mut need, mut memory, mut tokens) = (0, 0, u64::MAX);
        for count in 1..=wanted.len() {
            let some = &wanted[..count];
            let fit = Fit::of(some, &device, &terms().room).expect("it fits");
            let now = fit.weights + fit.workspace + fit.kv_guaranteed;
            let pod =
                place(some, &(0..count).collect::<Vec<_>>(), &device, &terms()).expect("fits");
            assert!(now >= need && pod.pod.memory >= memory, "{name}: {count} models");
            // The first model's part of the shared region only shrinks.
            assert!(fit.parts[0].kv_tokens <= tokens, "{name}: {count} models");
            (need, memory, tokens) = (now, pod.pod.memory, fit.parts[0].kv_tokens);
        }
    }
}

#[test]
fn more_memory_never_lowers_concurrency() {
    let all = models(&TRIO);
    let texts = [
        "llama-3.1-8b:rps=2,prompt=900,output=300,latency=60",
        "bge-large-en-v1.5:rps=20,prompt=256,latency=1",
        "bge-reranker-v2-m3:rps=5",
    ];
    let wanted = wanted(&all, &loads(&all, &texts));
    let mut device = device("a100-80");
    let (mut streams, mut scale) = (0, 0.0);
    let mut seen = 0;
    for gib in 18..=120_u64 {
        device.memory = gib << 30;
        let Ok(fit) = Fit::of(&wanted, &device, &terms().room) else {
            assert_eq!(seen, 0, "{gib} GiB hold less than fewer did");
            continue;
        };
        seen += 1;
        let speed = Speed::of(&device, &terms().room.assumed);
        let point = speed.capacity(&wanted, &fit).expect("some of it");
        assert!(fit.parts[0].streams >= streams, "{gib} GiB");
        assert!(point.scale >= scale * 0.999_999, "{gib} GiB: {} after {scale}", point.scale);
        (streams, scale) = (fit.parts[0].streams, point.scale);
    }
    assert!(seen > 90);
}

#[test]
fn a_higher_load_never_needs_fewer_replicas_and_a_tighter_objective_neither() {
    let all = models(&TRIO);
    let members = [0, 1, 2];
    let replicas = |rps: f64, latency: f64| {
        let load = format!("llama-3.1-8b:rps={rps},prompt=500,output=100,latency={latency}");
        let wanted = wanted(&all, &loads(&all, &[&load, "bge-large-en-v1.5:rps=5,latency=1"]));
        place(&all_of(&wanted), &members, &device("l4"), &terms()).map(|it| it.replicas)
    };
    let counts: Vec<u32> =
        [0.5, 1.0, 2.0, 4.0, 8.0].iter().map(|rps| replicas(*rps, 30.0).expect("fits")).collect();
    assert!(counts.is_sorted() && counts[4] > counts[0], "{counts:?}");
    let counts: Vec<u32> =
        [120.0, 30.0, 15.0].iter().map(|most| replicas(4.0, *most).expect("fits")).collect();
    assert!(counts.is_sorted() && counts[2] > counts[0], "{counts:?}");
    // One answer alone takes longer than this.
    assert!(replicas(0.1, 3.0).is_err());
}

fn all_of<'a>(wanted: &[Wanted<'a>]) -> Vec<Wanted<'a>> {
    wanted.to_vec()
}

/// At the planned point as many answers end as begin, and every objective holds.
#[test]
fn the_planned_load_is_carried() {
    let all = models(&TRIO);
    let load = "llama-3.1-8b:rps=1,prompt=500,output=100,latency=20";
    let wanted = wanted(&all, &loads(&all, &[load, "bge-large-en-v1.5:rps=5,latency=1"]));
    let placed = place(&wanted, &[0, 1, 2], &device("l4"), &terms()).expect("it fits");
    let point = placed.point.expect("there is a load");
    let each = 1.0 / f64::from(placed.replicas);
    assert!(each <= 0.75 * point.scale + 1e-9, "{each} of {}", point.scale);
    let speed = Speed::of(&placed.device, &terms().room.assumed);
    let lanes = speed.at(&wanted, &placed.fit, each).expect("a quarter to spare");
    for (one, lane) in wanted.iter().zip(&lanes) {
        assert!(one.load.latency_seconds.is_none_or(|most| lane.p95_seconds <= most));
        let little = one.load.rps * each * lane.mean_seconds;
        assert!((lane.in_flight - little).abs() < 1e-9);
    }
    // A decode step reads all weights at 70 % of 300 GB/s: 8.03 B parameters less the embedding.
    let least = (8_030_261_248.0 - 128_256.0 * 4096.0) * 2.0 / (300e9 * 0.7);
    let step = speed.decode(&wanted[0], 1.0);
    assert!(step > least && step < least * 1.02, "{step} against {least}");
    // A prompt's arithmetic: 2 × parameters in layers × tokens at 45 % of 121 TFLOP/s.
    let prompt = 2.0 * 6_979_588_096.0 * 500.0 / (121e12 * 0.45);
    assert!((speed.prefill(&wanted[0]) / prompt - 1.0).abs() < 0.02);
}

#[test]
fn pods_ask_for_what_a_node_can_hold() {
    let all = models(&TRIO);
    let wanted = wanted(&all, &loads(&all, &[]));
    for name in ["l4", "a10g", "a100-40", "h100"] {
        let placed = place(&wanted, &[0, 1, 2], &device(name), &terms()).expect("it fits");
        let (cpu, memory) = super::pod::part_of_node(&placed.device, &terms().room);
        assert!(placed.pod.cpu_m <= cpu && (2000..=4000).contains(&placed.pod.cpu_m), "{name}");
        assert!(placed.pod.memory <= memory, "{name}");
        assert!(placed.pod.memory >= placed.pod.memory_need * 13 / 10, "{name}");
        assert_eq!(placed.pod.device_memory_limit, placed.fit.limit);
        assert!(placed.pod.cache < placed.pod.storage);
    }
}

#[test]
fn the_usual_mistakes_are_named() {
    let warned = |flags: &[&str]| {
        let base = ["shape:llama-3.1-8b", "--device", "g6.xlarge"];
        plan(&[base.as_slice(), flags].concat()).expect("a plan")
    };
    let cases: [(&[&str], &str); 6] = [
        (&["--cpu", "16000"], "uses 2 to 4 cores"),
        (&["--cpu", "4000"], "g6.xlarge has 3920m allocatable"),
        (&["--memory", "1GiB"], "below the weights"),
        (&["--memory", "1GiB"], "it would be killed"),
        (&["--storage", "0"], "no ephemeral-storage request"),
        (&["--memory", "15GiB"], "Pending for ever"),
    ];
    for (flags, words) in cases {
        let text = warned(flags);
        assert!(text.contains(words), "{flags:?}: {text}");
        assert!(!warned(&["--node-storage", "100GiB"]).contains(words), "{words}");
    }
}

#[test]
fn what_cannot_be_planned_says_why() {
    let cases: [(&[&str], u8, &[&str]); 11] = [
        (
            &["shape:llama-3.1-70b"],
            2,
            &["7.82 GiB short", "fits on no single device", "as q8_0 (69.82 GiB) on h200"],
        ),
        (
            &[TRIO[0], TRIO[1], "--device", "mig:1g.10gb@a100-80"],
            2,
            &["7.56 GiB short", "nearest that fits llama-3.1-8b: l4", "these fit on mig:1g"],
        ),
        (&[TRIO[0], "--device", "l44"], 64, &["did you mean l4?", "a100-80", "g6.xlarge"]),
        // No kernels for it.
        (&[TRIO[0], "--device", "t4"], 64, &["no device is called \"t4\""]),
        (&["shape:llama-3.1-8"], 64, &["did you mean shape:llama-3.1-8b?"]),
        (&["shape:llama-3.1-8b@q9"], 64, &["q9", "q8_0"]),
        (&["no-such-model"], 64, &["no-such-model"]),
        (&[TRIO[0], "--load", "llama-3.1-8b:rps=x"], 64, &["rps is from"]),
        (&[TRIO[0], "--load", "llama-3.1-8:rps=1"], 64, &["did you mean llama-3.1-8b?"]),
        (&[TRIO[0], TRIO[0]], 64, &["twice"]),
        (&[TRIO[0], "--spot"], 64, &["--spot-discount"]),
    ];
    for (arguments, code, words) in cases {
        let (exit, message) = plan(arguments).expect_err("no plan");
        assert_eq!(exit, code, "{arguments:?}: {message}");
        for word in words {
            assert!(message.contains(word), "{arguments:?}: {message}");
        }
    }
}

#[test]
fn a_hostile_header_is_an_error_that_names_the_file() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut huge = (1_u64 << 60).to_le_bytes().to_vec();
    huge.extend(b"{}");
    let lies = br#"{"w":{"dtype":"F32","shape":[1,9999999],"data_offsets":[0,4]}}"#;
    let mut short = (lies.len() as u64).to_le_bytes().to_vec();
    short.extend(lies);
    short.extend([0; 4]);
    let files: [(&str, Vec<u8>); 4] = [
        ("huge.safetensors", huge),
        ("lies.safetensors", short),
        ("cut.gguf", b"GGUF\x03\0\0\0\xff\xff\xff\xff\xff\xff\xff\x7f".to_vec()),
        ("noise.gguf", vec![0xa5; 4096]),
    ];
    for (name, bytes) in files {
        let path: PathBuf = folder.path().join(name);
        std::fs::write(&path, bytes).expect("a file");
        let (exit, message) = plan(&[path.to_str().expect("text")]).expect_err("no plan");
        assert_eq!(exit, 65, "{message}");
        assert!(message.contains(name), "{message}");
    }
    let path = folder.path().join("absurd.toml");
    let text = "model_type = \"llama\"\nhidden_size = 99999999\nnum_attention_heads = 1\n";
    std::fs::write(&path, text).expect("a file");
    let (exit, message) = plan(&[path.to_str().expect("text")]).expect_err("no plan");
    assert_eq!((exit, message.contains("hidden_size")), (65, true), "{message}");
}

#[test]
fn a_file_adds_devices_prices_and_assumptions() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("mine.toml");
    let text = "[[chip]]\nname = \"big\"\nkind = \"gpu\"\nmemory_mib = 300000\n\
                bandwidth_gb_s = 8000\ntflops = 2000\n[[instance]]\nname = \"big.1\"\n\
                chip = \"big\"\ncount = 1\ncpu_m = 15000\nmemory_mib = 200000\nstorage_gib = 500\n\
                usd_per_hour = 10.0\nspot_usd_per_hour = 4.0\nas_of = \"2026-11-01\"\n\
                [assumptions]\nhours = 100\n";
    std::fs::write(&path, text).expect("a file");
    let file = path.to_str().expect("text");
    let text = plan(&["shape:llama-3.1-70b", "-f", file, "--spot"]).expect("it fits now");
    assert!(text.contains("2 × big, 800 USD a month on spot"), "{text}");
    for (wrong, word) in [("hourz = 1", "did you mean hours?"), ("hours = 0", "above 0")] {
        std::fs::write(&path, format!("[assumptions]\n{wrong}\n")).expect("a file");
        let (exit, message) = plan(&["shape:llama-3.2-1b", "-f", file]).expect_err("no plan");
        assert_eq!((exit, message.contains(word)), (65, true), "{message}");
    }
    std::fs::write(
        &path,
        "[[instance]]\nname = \"x\\ny\"\nchip = \"l4\"\ncount = 1\ncpu_m = 1\n\
                           memory_mib = 1\nstorage_gib = 1\nusd_per_hour = 1\nas_of = \"d\"\n",
    )
    .expect("a file");
    assert_eq!(plan(&["shape:llama-3.2-1b", "-f", file]).expect_err("odd name").0, 65);
}

/// A small and a large model that need different devices: two groups cost less than one.
#[test]
fn models_go_together_only_where_that_is_cheaper() {
    let together = plan(&TRIO).expect("a plan");
    assert!(together.contains("3 models, a device each: 3 devices"), "{together}");
    let text = plan(&["shape:llama-3.1-8b", "shape:all-minilm-l6-v2", "-o", "json"]).expect("fits");
    let json: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    assert_eq!(json["schema"], 1);
    let groups = json["groups"].as_array().expect("a list");
    let sum: f64 = groups.iter().filter_map(|it| it["usd_per_month"].as_f64()).sum();
    assert!((sum - json["totals"]["usd_per_month"].as_f64().expect("a sum")).abs() < 1e-6);
    let least = json["together"][0]["usd_per_month"].as_f64().expect("a price");
    assert!(sum <= least, "{sum} against all together for {least}");
}
