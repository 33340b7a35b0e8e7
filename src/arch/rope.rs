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
}

const BASE_DEFAULT: f64 = 10_000.0;

impl Rope {
    /// From the metadata of a GGUF file. Factors of single pairs are a tensor; whoever has read it
    /// sets them.
    ///
    /// # Errors
    /// A kind of scaling that is not known.
    pub(super) fn from_gguf(header: &Header, prefix: &str) -> Result<Self, LoadError> {
        let number = |key: &str| -> Result<Option<f64>, LoadError> {
            let key = format!("{prefix}.rope.{key}");
            let value = header.has(&key).then(|| header.f32(&key)).transpose();
            value.map(|value| value.map(f64::from)).map_err(shape)
        };
        let kind = format!("{prefix}.rope.scaling.type");
        // As llama.cpp has it: a factor alone is a linear one, also by its first name.
        let kind = if header.has(&kind) { header.str(&kind).map_err(shape)? } else { "linear" };
        let factor = number("scaling.factor")?.or(number("scale_linear")?);
        let scaling = match (kind, factor.unwrap_or(0.0)) {
            ("none", _) | ("linear", 0.0 | 1.0) => Scaling::None,
            ("linear", factor) => Scaling::Linear(factor),
            (other, _) => return Err(unknown(other)),
        };
        Self { base: number("freq_base")?.unwrap_or(BASE_DEFAULT), scaling }.checked()
    }

    /// From `config.json`: `rope_theta` and `rope_scaling`, or both in `rope_parameters`.
    ///
    /// # Errors
    /// A kind of scaling that is not known, or one without its numbers.
    pub(super) fn from_json(config: &Json) -> Result<Self, LoadError> {
        let section = |key: &str| config.get(key).filter(|value| value.is_object());
        let parameters = section("rope_parameters").or_else(|| section("rope_scaling"));
        let get = |key: &str| parameters.and_then(|parameters| parameters.get(key));
        let number = |key: &str| -> Result<f64, LoadError> {
            get(key).and_then(Json::as_f64).ok_or_else(|| {
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

    /// Cosines, then sines, of each position's rotation angles: `[context][head_dim]`, the first
    /// half of a row cosines, the second half sines. Angles are taken in f64: at position 8,000 an
    /// f32 product is already off by 5e-4.
    pub(super) fn table(&self, context: usize, head_dim: usize) -> Vector {
        let half = head_dim / 2;
        let turns: Vec<f64> = (0..half).map(|pair| self.turn(pair, half)).collect();
        let mut table = vec![0f32; context * head_dim];
        for (position, row) in table.chunks_exact_mut(head_dim).enumerate() {
            for (i, turn) in turns.iter().enumerate() {
                let angle = position as f64 * turn;
                row[i] = angle.cos() as f32;
                row[half + i] = angle.sin() as f32;
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
        }
    }
}

/// The table of a layer whose heads are not turned at all.
pub(super) fn unturned(context: usize, head_dim: usize) -> Vector {
    let row = (0..head_dim).map(|i| if i < head_dim / 2 { 1.0 } else { 0.0 });
    let row: Vec<f32> = row.collect();
    row.repeat(context).into()
}

fn unknown(kind: &str) -> LoadError {
    LoadError::Shape(format!(
        "rotary scaling '{kind}' is not known; known are none, linear and llama3"
    ))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use serde_json::json;

    use super::*;
    use crate::store::gguf::Value;

    fn read(config: Json) -> Result<Rope, String> {
        Rope::from_json(&config).map_err(|error| error.to_string())
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
            Rope::from_gguf(&header, "llama").map(|rope| rope.scaling)
        };
        let word = |word: &str| Value::String(word.to_owned());
        let linear = Scaling::Linear(8.0);
        assert_eq!(read(&[]).unwrap(), Scaling::None);
        assert_eq!(read(&[("scaling.factor", Value::Float(8.0))]).unwrap(), linear);
        assert_eq!(read(&[("scale_linear", Value::Float(8.0))]).unwrap(), linear);
        assert_eq!(read(&[("scale_linear", Value::Float(1.0))]).unwrap(), Scaling::None);
        let none = [("scaling.type", word("none")), ("scaling.factor", Value::Float(8.0))];
        assert_eq!(read(&none).unwrap(), Scaling::None);
        assert!(read(&[("scaling.type", word("yarn"))]).is_err());
    }

    #[test]
    fn unknown_or_unsound_scaling_is_refused() {
        let scaled = |scaling: Json| read(json!({ "rope_scaling": scaling })).unwrap_err();
        assert!(scaled(json!({ "rope_type": "yarn", "factor": 4.0 })).contains("'yarn'"));
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

    #[test]
    fn an_unturned_row_is_the_identity() {
        assert_eq!(*unturned(2, 4), [1.0, 1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0]);
    }
}
