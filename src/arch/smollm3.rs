//! SmolLM3: Llama in which every fourth layer has no rotary positions.

use crate::arch::Description;
use crate::arch::decoder::Shape;
use crate::arch::facts::Facts;
use crate::weights::LoadError;

pub(super) fn shape(description: &Description<'_>) -> Result<Shape, LoadError> {
    let mut shape = Shape::read(description)?.with_interleaved_gguf();
    let facts = Facts::new(description)?;
    // In `config.json` a list of ones, and a zero for each layer without.
    let turned = match facts.list("no_rope_layers") {
        Some(list) => list.iter().map(|layer| layer.as_u64() != Some(0)).collect(),
        None => (1..=shape.kv.layers).map(|layer| !layer.is_multiple_of(4)).collect::<Vec<_>>(),
    };
    if turned.len() != shape.kv.layers {
        let (listed, layers) = (turned.len(), shape.kv.layers);
        return Err(LoadError::Shape(format!(
            "config.json: 'no_rope_layers' lists {listed} layers of {layers}"
        )));
    }
    shape.turned = turned;
    // As its configuration has it where the file is silent.
    shape.tied |= !facts.says("tie_word_embeddings");
    if facts.flag("use_sliding_window") == Some(true) {
        return Err(LoadError::Shape("config.json: 'use_sliding_window' is not known yet".into()));
    }
    Ok(shape)
}
