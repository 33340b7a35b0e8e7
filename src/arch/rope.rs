//! Rotary positions: how a file says that they turn, and the angles of every position, as the
//! kernels want them. Knows no layer.

use std::f64::consts::TAU;

use serde_json::Value as Json;

use crate::arch::shape;
use crate::kernels::ops::Vector;
use crate::store::gguf::Header;
use crate::weights::LoadError;

/// How fast pairs of dimensions turn.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Rope {
    /// Pair `i` of `n` turns by `base^(-i / n)` a position, before scaling.
    pub(super) base: f64,
    /// What makes it slower.
    pub(super) scaling: Scaling,
}

/// How a model was stretched beyond the context that it was first trained with.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Scaling {
    /// Not at all.
    None,
    /// Every pair turns slower by this factor.
    Linear(f64),
    /// Slow pairs turn slower by `factor`, fast ones as ever, those between in between (Llama 3.1).
    /// A pair is slow if a full turn takes more than `original / low` positions, and fast if it
    /// takes fewer than `original / high`.
    Llama3 { factor: f64, low: f64, high: f64, original: f64 },
    /// Each pair turns slower by a factor of its own.
    Factors(Vec<f32>),
    /// As Llama 3.1's, between other bounds, and queries and keys grow.
    Yarn(Yarn),
}

/// YaRN (arXiv 2309.00071), as Transformers and llama.cpp have it.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Yarn {
    /// By how much slow pairs turn slower.
    factor: f64,
    /// Positions of the first training.
    original: f64,
    /// Pairs that turn as often in these are fast.
    fast: f64,
    /// Pairs that turn no oftener are slow.
    slow: f64,
    /// The bounds between them are whole pairs.
    whole: bool,
    /// What queries and keys are multiplied by.
    magnitude: f64,
}

const BASE_DEFAULT: f64 = 10_000.0;

impl Rope {
    /// From the metadata of a GGUF file, which gives `context` positions. Factors of single pairs
    /// are a tensor; whoever has read it sets them.
    ///
    /// # Errors
    /// A kind of scaling that is not known.
    pub(super) fn from_gguf(
        header: &Header,
        prefix: &str,
        context: usize,
    ) -> Result<Self, LoadError> {
        let number = |key: &str| -> Result<Option<f64>, LoadError> {
            let key = format!("{prefix}.rope.{key}");
            let value = header.has(&key).then(|| header.f32(&key)).transpose();
            value.map(|value| value.map(f64::from)).map_err(shape)
        };
        let kind = format!("{prefix}.rope.scaling.type");
        // As llama.cpp has it: a factor alone is a linear one, also by its first name.
        let kind = if header.has(&kind) { header.str(&kind).map_err(shape)? } else { "linear" };
        let factor = number("scaling.factor")?.or(number("scale_linear")?);
        let yarn = || -> Result<Yarn, LoadError> {
            let original = number("scaling.original_context_length")?;
            let yarn = Yarn::new(factor.unwrap_or(1.0), original.unwrap_or(context as f64));
            Ok(Yarn {
                fast: number("scaling.yarn_beta_fast")?.unwrap_or(yarn.fast),
                slow: number("scaling.yarn_beta_slow")?.unwrap_or(yarn.slow),
                magnitude: yarn.magnitude * number("scaling.attn_factor")?.unwrap_or(1.0),
                ..yarn
            })
        };
        let scaling = match (kind, factor.unwrap_or(0.0)) {
            ("yarn", _) => Scaling::Yarn(yarn()?),
            ("none", _) | ("linear", 0.0 | 1.0) => Scaling::None,
            ("linear", factor) => Scaling::Linear(factor),
            (other, _) => return Err(unknown(other)),
        };
        Self { base: number("freq_base")?.unwrap_or(BASE_DEFAULT), scaling }.checked()
    }

    /// From `config.json`, which gives `context` positions: `rope_theta` and `rope_scaling`, or
    /// both in `rope_parameters`.
    ///
    /// # Errors
    /// A kind of scaling that is not known, or one without its numbers.
    pub(super) fn from_json(config: &Json, context: usize) -> Result<Self, LoadError> {
        let section = |key: &str| config.get(key).filter(|value| value.is_object());
        let parameters = section("rope_parameters").or_else(|| section("rope_scaling"));
        let get = |key: &str| parameters.and_then(|parameters| parameters.get(key));
        let maybe = |key: &str| get(key).and_then(Json::as_f64);
        let number = |key: &str| -> Result<f64, LoadError> {
            maybe(key).ok_or_else(|| {
                LoadError::Shape(format!("config.json: '{key}' of the rotary scaling is missing"))
            })
        };
        let kind = get("rope_type").or_else(|| get("type")).and_then(Json::as_str);
        let scaling = match kind.unwrap_or("default") {
            // Dynamic scaling begins beyond the model's own context, which is never exceeded here.
            "default" | "dynamic" => Scaling::None,
            "linear" => Scaling::Linear(number("factor")?),
            "llama3" => Scaling::Llama3 {
                factor: number("factor")?,
                low: number("low_freq_factor")?,
                high: number("high_freq_factor")?,
                original: number("original_max_position_embeddings")?,
            },
            "yarn" => {
                let original = maybe("original_max_position_embeddings");
                let yarn = Yarn::new(number("factor")?, original.unwrap_or(context as f64));
                let magnitude = match (maybe("mscale"), maybe("mscale_all_dim")) {
                    (Some(one), Some(all)) if one != 0.0 && all != 0.0 => {
                        growth(yarn.factor, one) / growth(yarn.factor, all)
                    }
                    _ => yarn.magnitude,
                };
                let magnitude = maybe("attention_factor").unwrap_or(magnitude);
                Scaling::Yarn(Yarn {
                    fast: maybe("beta_fast").unwrap_or(yarn.fast),
                    slow: maybe("beta_slow").unwrap_or(yarn.slow),
                    whole: get("truncate").and_then(Json::as_bool).unwrap_or(true),
                    // DeepSeek's and vLLM's name for one more factor.
                    magnitude: magnitude * maybe("attn_factor").unwrap_or(1.0),
                    ..yarn
                })
            }
            other => return Err(unknown(other)),
        };
        let partial = get("partial_rotary_factor").or_else(|| config.get("partial_rotary_factor"));
        if partial.and_then(Json::as_f64).is_some_and(|part| part != 1.0) {
            return Err(LoadError::Shape("partial rotary positions are not known yet".into()));
        }
        let base = get("rope_theta").or_else(|| config.get("rope_theta")).and_then(Json::as_f64);
        Self { base: base.unwrap_or(BASE_DEFAULT), scaling }.checked()
    }

    fn checked(self) -> Result<Self, LoadError> {
        let positive = |value: f64| value.is_finite() && value > 0.0;
        let sound = match &self.scaling {
            Scaling::None => true,
            Scaling::Linear(factor) => positive(*factor),
            Scaling::Llama3 { factor, low, high, original } => {
                [*factor, *low, *original].into_iter().all(positive) && high > low
            }
            Scaling::Factors(factors) => factors.iter().all(|factor| positive((*factor).into())),
            Scaling::Yarn(yarn) => {
                let Yarn { factor, original, fast, slow, magnitude, .. } = *yarn;
                let all = [factor, original, fast, slow, magnitude].into_iter().all(positive);
                all && fast > slow && self.base > 1.0
            }
        };
        if sound && positive(self.base) {
            return Ok(self);
        }
        let message = format!("rotary positions with base {} and {:?}", self.base, self.scaling);
        Err(LoadError::Shape(format!("{message}: numbers out of range")))
    }

    /// With factors of single pairs, `pairs` of them.
    ///
    /// # Errors
    /// There are not as many, one is not positive, or there is another scaling too.
    pub(super) fn with_factors(self, factors: &[f32], pairs: usize) -> Result<Self, LoadError> {
        if factors.len() != pairs || self.scaling != Scaling::None {
            let (found, scaling) = (factors.len(), self.scaling);
            return Err(LoadError::Shape(format!(
                "{found} rotary factors for {pairs} pairs, beside scaling {scaling:?}"
            )));
        }
        Self { scaling: Scaling::Factors(factors.to_vec()), ..self }.checked()
    }

    /// Positions that the model can tell apart, by a description that says `context`: of a model
    /// that was stretched it may mean the first training.
    pub(super) fn context(&self, context: usize) -> usize {
        match &self.scaling {
            Scaling::Yarn(yarn) => context.max((yarn.original * yarn.factor) as usize),
            _ => context,
        }
    }

    /// Cosines, then sines, of each position's rotation angles: `[context][head_dim]`, the first
    /// half of a row cosines, the second half sines, all times the scaling's magnitude. Angles are
    /// taken in f64: at position 8,000 an f32 product is already off by 5e-4.
    pub(super) fn table(&self, context: usize, head_dim: usize) -> Vector {
        let half = head_dim / 2;
        let turns: Vec<f64> = (0..half).map(|pair| self.turn(pair, half)).collect();
        let magnitude = match &self.scaling {
            Scaling::Yarn(yarn) => yarn.magnitude,
            _ => 1.0,
        };
        let mut table = vec![0f32; context * head_dim];
        for (position, row) in table.chunks_exact_mut(head_dim).enumerate() {
            for (i, turn) in turns.iter().enumerate() {
                let angle = position as f64 * turn;
                row[i] = (magnitude * angle.cos()) as f32;
                row[half + i] = (magnitude * angle.sin()) as f32;
            }
        }
        table.into()
    }

    /// By how much pair `pair` of `pairs` turns a position.
    fn turn(&self, pair: usize, pairs: usize) -> f64 {
        let turn = self.base.powf(-(pair as f64) / pairs as f64);
        match &self.scaling {
            Scaling::None => turn,
            Scaling::Linear(factor) => turn / factor,
            Scaling::Factors(factors) => turn / f64::from(factors[pair]),
            Scaling::Llama3 { factor, low, high, original } => {
                let turns = original * turn / TAU;
                let fast = ((turns - low) / (high - low)).clamp(0.0, 1.0);
                turn * (fast + (1.0 - fast) / factor)
            }
            Scaling::Yarn(yarn) => {
                let slow = yarn.slow_part(pair, pairs, self.base);
                turn * (1.0 - slow + slow / yarn.factor)
            }
        }
    }
}

impl Yarn {
    /// With the paper's bounds and growth.
    fn new(factor: f64, original: f64) -> Self {
        let magnitude = growth(factor, 1.0);
        Self { factor, original, fast: 32.0, slow: 1.0, whole: true, magnitude }
    }

    /// How much of a slow pair is in pair `pair`.
    fn slow_part(&self, pair: usize, pairs: usize, base: f64) -> f64 {
        let dims = 2.0 * pairs as f64;
        let turning = |turns: f64| dims * (self.original / (turns * TAU)).ln() / (2.0 * base.ln());
        let (mut first, mut last) = (turning(self.fast), turning(self.slow));
        if self.whole {
            (first, last) = (first.floor(), last.ceil());
        }
        (first, last) = (first.max(0.0), last.min(dims - 1.0));
        if first == last {
            last += 0.001;
        }
        ((pair as f64 - first) / (last - first)).clamp(0.0, 1.0)
    }
}

/// How much queries and keys grow as a text is stretched by `factor`.
fn growth(factor: f64, weight: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * weight * factor.ln() + 1.0 }
}

/// The table of a layer whose heads are not turned at all.
pub(super) fn unturned(context: usize, head_dim: usize) -> Vector {
    let row = (0..head_dim).map(|i| if i < head_dim / 2 { 1.0 } else { 0.0 });
    let row: Vec<f32> = row.collect();
    row.repeat(context).into()
}

fn unknown(kind: &str) -> LoadError {
    LoadError::Shape(format!(
        "rotary scaling '{kind}' is not known; known are none, linear, llama3 and yarn"
    ))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use serde_json::json;

    use super::*;
    use crate::store::gguf::Value;

    fn read(config: Json) -> Result<Rope, String> {
        Rope::from_json(&config, 4096).map_err(|error| error.to_string())
    }

    #[test]
    fn old_and_new_configurations_say_the_same() {
        let old = json!({ "rope_theta": 5e5, "rope_scaling": { "type": "linear", "factor": 4 } });
        let new = json!({ "rope_parameters": {
            "rope_theta": 5e5, "rope_type": "linear", "factor": 4.0 } });
        let expected = Rope { base: 5e5, scaling: Scaling::Linear(4.0) };
        assert_eq!(read(old).unwrap(), expected);
        assert_eq!(read(new).unwrap(), expected);
        let plain = Rope { base: 10_000.0, scaling: Scaling::None };
        assert_eq!(read(json!({ "rope_scaling": null })).unwrap(), plain);
    }

    #[test]
    fn a_factor_alone_in_a_gguf_file_is_linear() {
        let read = |keys: &[(&str, Value)]| {
            let keys = keys.iter().map(|(key, value)| (format!("llama.rope.{key}"), value.clone()));
            let header = Header { metadata: keys.collect(), tensors: BTreeMap::new() };
            Rope::from_gguf(&header, "llama", 4096).map(|rope| rope.scaling)
        };
        let word = |word: &str| Value::String(word.to_owned());
        let linear = Scaling::Linear(8.0);
        assert_eq!(read(&[]).unwrap(), Scaling::None);
        assert_eq!(read(&[("scaling.factor", Value::Float(8.0))]).unwrap(), linear);
        assert_eq!(read(&[("scale_linear", Value::Float(8.0))]).unwrap(), linear);
        assert_eq!(read(&[("scale_linear", Value::Float(1.0))]).unwrap(), Scaling::None);
        let none = [("scaling.type", word("none")), ("scaling.factor", Value::Float(8.0))];
        assert_eq!(read(&none).unwrap(), Scaling::None);
        assert!(read(&[("scaling.type", word("longrope"))]).is_err());
        let yarn = |keys: &[(&str, Value)]| {
            let kind = ("scaling.type", word("yarn"));
            let factor = ("scaling.factor", Value::Float(4.0));
            match read(&[&[kind, factor], keys].concat()).unwrap() {
                Scaling::Yarn(yarn) => yarn,
                other => panic!("{other:?}"),
            }
        };
        let original = ("scaling.original_context_length", Value::Uint(32_768));
        assert_eq!(yarn(std::slice::from_ref(&original)), Yarn::new(4.0, 32_768.0));
        let less = yarn(&[original, ("scaling.attn_factor", Value::Float(0.5))]);
        assert_eq!(less.magnitude, 0.5 * growth(4.0, 1.0));
    }

    #[test]
    fn unknown_or_unsound_scaling_is_refused() {
        let scaled = |scaling: Json| read(json!({ "rope_scaling": scaling })).unwrap_err();
        assert!(scaled(json!({ "rope_type": "longrope" })).contains("'longrope'"));
        assert!(scaled(json!({ "rope_type": "yarn" })).contains("'factor'"));
        let yarn = |original: u64, fast: f64| {
            json!({ "rope_type": "yarn", "factor": 4.0, "beta_fast": fast,
                "original_max_position_embeddings": original })
        };
        assert!(scaled(yarn(0, 32.0)).contains("out of range"));
        assert!(scaled(yarn(4096, 1.0)).contains("out of range"));
        assert!(scaled(json!({ "rope_type": "linear" })).contains("'factor'"));
        assert!(scaled(json!({ "rope_type": "linear", "factor": 0 })).contains("out of range"));
        assert!(read(json!({ "partial_rotary_factor": 0.5 })).unwrap_err().contains("partial"));
        let plain = || Rope { base: 1e4, scaling: Scaling::None };
        assert!(plain().with_factors(&[1.0; 3], 4).is_err());
        assert!(plain().with_factors(&[1.0, 0.0], 2).is_err());
        assert!(plain().with_factors(&[1.0, 8.0], 2).is_ok());
    }

    #[test]
    fn llama3_leaves_fast_pairs_and_slows_the_others() {
        let scaling = Scaling::Llama3 { factor: 8.0, low: 1.0, high: 4.0, original: 8192.0 };
        let rope = Rope { base: 5e5, scaling };
        let plain = Rope { base: 5e5, scaling: Scaling::None };
        let ratio = |pair| plain.turn(pair, 64) / rope.turn(pair, 64);
        assert_eq!(ratio(0), 1.0);
        assert!((ratio(63) - 8.0).abs() < 1e-9);
        let between: Vec<f64> = (0..64).map(ratio).filter(|r| *r > 1.0 && *r < 7.999).collect();
        assert!(!between.is_empty() && between.is_sorted());
    }

    /// Frequencies and factors of Transformers 5.24 for heads of 128 (`ROPE_INIT_FUNCTIONS`).
    #[test]
    fn yarn_turns_as_transformers_does() {
        let qwen3 = json!({ "rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0,
            "original_max_position_embeddings": 32768 });
        let unlike = json!({ "rope_type": "yarn", "rope_theta": 5e5, "factor": 8.0,
            "original_max_position_embeddings": 8192, "beta_fast": 16, "beta_slow": 2,
            "mscale": 1.0, "mscale_all_dim": 0.5 });
        let mut broken = qwen3.clone();
        broken["truncate"] = json!(false);
        let pairs = [0, 16, 24, 30, 35, 40, 50, 63];
        for (parameters, magnitude, turns) in [
            (
                &qwen3,
                1.138_629_436,
                [
                    1.0,
                    3.162_277_86e-2,
                    5.375_321_49e-3,
                    1.064_360_96e-3,
                    2.462_583_94e-4,
                    4.445_698_51e-5,
                    5.133_812_46e-6,
                    3.102_344_41e-7,
                ],
            ),
            (
                &unlike,
                1.094_179_988,
                [
                    1.0,
                    3.760_603_07e-2,
                    5.552_370_57e-3,
                    6.054_317_35e-4,
                    9.556_212_17e-5,
                    3.428_102_35e-5,
                    4.411_534_52e-6,
                    3.068_925_88e-7,
                ],
            ),
            (
                &broken,
                1.138_629_436,
                [
                    1.0,
                    3.162_277_86e-2,
                    5.517_270_42e-3,
                    1.079_237_67e-3,
                    2.445_188_87e-4,
                    4.445_698_51e-5,
                    5.133_812_46e-6,
                    3.102_344_41e-7,
                ],
            ),
        ] {
            let rope = read(json!({ "rope_parameters": parameters })).unwrap();
            for (pair, expected) in pairs.into_iter().zip(turns) {
                let turn = rope.turn(pair, 64);
                assert!((turn / expected - 1.0).abs() < 2e-6, "pair {pair}: {turn}");
            }
            // Position 0 is not turned: its cosines are the magnitude.
            let table = rope.table(1, 128);
            assert!((f64::from(table[5]) - magnitude).abs() < 1e-6 && table[69] == 0.0);
        }
        let rope = read(json!({ "rope_parameters": qwen3 })).unwrap();
        assert_eq!((rope.context(40_960), rope.context(200_000)), (131_072, 200_000));
        let mut named = qwen3.clone();
        named["attn_factor"] = json!(0.878_248_856_286_941_9);
        let Scaling::Yarn(yarn) = read(json!({ "rope_scaling": named })).unwrap().scaling else {
            panic!("yarn");
        };
        assert!((yarn.magnitude - 1.0).abs() < 1e-6);
    }

    #[test]
    fn an_unturned_row_is_the_identity() {
        assert_eq!(*unturned(2, 4), [1.0, 1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0]);
    }
}
