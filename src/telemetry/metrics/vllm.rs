//! The names by which vLLM's users know the same numbers: what the Gateway API's endpoint picker,
//! llm-d, KEDA recipes and dashboards read. Each is one of our families under another name, with
//! our buckets; what has no counterpart here is not made up. Off by default.

use std::collections::HashMap;

use super::{
    CACHED_TOKENS, FIRST_TOKEN, Family, GENERATED_TOKENS, KV_USAGE, Kind, PREEMPTIONS,
    PROMPT_TOKENS, QUEUE_DEPTH, QUEUE_WAIT, REJECTED, REQUEST_DURATION, REQUESTS_RUNNING,
    TOKEN_GAP, family,
};
use crate::scheduler::step::BLOCK_TOKENS;
use crate::telemetry::exposition::{write_head, write_series};

/// Another name of a family.
struct Alias {
    family: Family,
    of: &'static Family,
}

/// Names for the whole process come first: routers take the first series that they find, and with
/// several models one model's would be an arbitrary one.
static ALIASES: [Alias; 15] = [
    alias("vllm:num_requests_waiting", &QUEUE_DEPTH),
    alias("vllm:num_requests_running", &REQUESTS_RUNNING),
    alias("vllm:kv_cache_usage_perc", &KV_USAGE),
    alias("vllm:gpu_cache_usage_perc", &KV_USAGE),
    alias("vllm:num_preemptions_total", &PREEMPTIONS),
    alias("vllm:prompt_tokens_total", &PROMPT_TOKENS),
    alias("vllm:generation_tokens_total", &GENERATED_TOKENS),
    alias("vllm:prefix_cache_queries_total", &PROMPT_TOKENS),
    alias("vllm:prefix_cache_hits_total", &CACHED_TOKENS),
    alias("vllm:admission_rejections_total", &REJECTED),
    alias("vllm:time_to_first_token_seconds", &FIRST_TOKEN),
    alias("vllm:inter_token_latency_seconds", &TOKEN_GAP),
    alias("vllm:time_per_output_token_seconds", &TOKEN_GAP),
    alias("vllm:e2e_request_latency_seconds", &REQUEST_DURATION),
    alias("vllm:request_queue_time_seconds", &QUEUE_WAIT),
];

/// How the cache is cut, for routers that count blocks.
static CACHE_CONFIG: Family = family(
    Kind::Gauge,
    "vllm:cache_config_info",
    "",
    &["model_name", "block_size", "num_gpu_blocks"],
)
.help("Always 1: tokens of a KV block, and blocks that the model could have if it had all pages.");

const fn alias(name: &'static str, of: &'static Family) -> Alias {
    let family = family(of.kind, name, of.unit, of.labels).help(of.help);
    Alias { family, of }
}

/// Appends the aliases to a whole page. `models` are those by name with the blocks of each; none
/// for a model without a cache.
pub(in crate::telemetry) fn append<'a>(
    page: &mut String,
    models: impl Iterator<Item = (&'a str, u64)>,
) {
    let mut added = String::new();
    let samples = samples(page);
    for Alias { family, of } in &ALIASES {
        let Some(lines) = samples.get(of.name) else { continue };
        write_head(&mut added, family);
        for line in lines.lines().filter(|line| !line.is_empty()) {
            let Some(rest) = line.strip_prefix(of.name) else { continue };
            added.push_str(family.name);
            // `model` is always the first label, and such a brace is in no label's value before it.
            match rest.split_once("{model=\"") {
                Some((suffix, labels)) => {
                    added.extend([suffix, "{model_name=\"", labels, "\n"]);
                }
                None => added.extend([rest, "\n"]),
            }
        }
        added.push('\n');
    }
    write_head(&mut added, &CACHE_CONFIG);
    for (model, blocks) in models.filter(|(_, blocks)| *blocks > 0) {
        let values = [model, &BLOCK_TOKENS.to_string(), &blocks.to_string()];
        write_series(&mut added, &CACHE_CONFIG, &values);
        added.push_str(" 1\n");
    }
    added.push('\n');
    page.push_str(&added);
}

/// The sample lines of each family of a page.
fn samples(page: &str) -> HashMap<&str, &str> {
    let mut samples = HashMap::new();
    for block in page.split("\n# TYPE ").skip(1) {
        let Some((head, rest)) = block.split_once('\n') else { continue };
        let name = head.split(' ').next().unwrap_or_default();
        samples.insert(name, rest.split("\n# HELP ").next().unwrap_or_default());
    }
    samples
}

#[cfg(test)]
mod tests {
    use crate::model::ModelTask;
    use crate::request::{LaneId, Micros};
    use crate::telemetry::tests::rendering;
    use crate::telemetry::{Rejection, Setup, Telemetry};

    fn page(vllm_metrics: bool) -> String {
        let models =
            vec![("chat".to_owned(), ModelTask::Generate), ("embed".to_owned(), ModelTask::Embed)];
        let telemetry = Telemetry::new(Setup { models, vllm_metrics, ..Setup::default() });
        telemetry.kv_layout(LaneId(0), 30, 4);
        telemetry.kv_limit(600);
        telemetry.submitted(LaneId(0), 10);
        telemetry.first_token(LaneId(0), Micros(7_000));
        telemetry.rejected(Some(LaneId(1)), Rejection::QueueFull);
        telemetry.render()
    }

    #[test]
    fn the_same_numbers_stand_under_both_names() {
        assert!(!page(false).contains("vllm:"), "off by default");
        let page = page(true);
        for line in [
            "vllm:num_requests_waiting 1",
            "vllm:num_requests_running 0",
            "vllm:kv_cache_usage_perc 0",
            "vllm:gpu_cache_usage_perc 0",
            "vllm:num_preemptions_total{model_name=\"embed\"} 0",
            "vllm:time_to_first_token_seconds_count{model_name=\"chat\"} 1",
            "vllm:time_to_first_token_seconds_bucket{model_name=\"chat\",le=\"0.01\"} 1",
            "vllm:e2e_request_latency_seconds_sum{model_name=\"embed\",task=\"embed\"} 0",
            "vllm:admission_rejections_total{model_name=\"embed\",reason=\"queue_full\"} 1",
            "vllm:cache_config_info{model_name=\"chat\",block_size=\"32\",num_gpu_blocks=\"80\"} 1",
            "# TYPE vllm:inter_token_latency_seconds histogram",
        ] {
            assert_eq!(page.lines().filter(|found| *found == line).count(), 1, "{line} in\n{page}");
        }
        // Of every name, one block, with a sample in it.
        for alias in &super::ALIASES {
            let name = alias.family.name;
            let head = format!("# TYPE {name} ");
            assert_eq!(page.matches(&head).count(), 1, "{name}");
            let samples = page.lines().filter(|line| line.starts_with(name)).count();
            assert!(samples > 0, "{name} has no sample");
        }
        let waiting = page.lines().filter(|line| line.starts_with("vllm:num_requests_waiting"));
        assert_eq!(waiting.count(), 1, "one series for the whole process");
    }

    /// Routers scrape every 50 ms.
    #[test]
    fn another_name_costs_little() {
        let [plain, named] = [false, true].map(|vllm_metrics| {
            let models = (0..16).map(|i| (format!("model-{i}"), ModelTask::Generate)).collect();
            Telemetry::new(Setup { models, vllm_metrics, ..Setup::default() })
        });
        let [plain, named] = rendering([&plain, &named]);
        assert!(named < 4 * plain, "{plain:?}, with other names {named:?}");
    }
}
