//! Mistral: Llama with a sliding window in its first versions. A row sees the last `window`
//! positions; up to a context of that length this is causal attention, and longer ones are not
//! served.

use crate::arch::Description;
use crate::arch::decoder::Shape;
use crate::arch::facts::Facts;
use crate::weights::LoadError;

pub(super) fn shape(description: &Description<'_>) -> Result<Shape, LoadError> {
    let mut shape = Shape::read(description)?.with_interleaved_gguf();
    let facts = Facts::new(description)?;
    // What is meant where `config.json` says nothing; later versions say null.
    let window = if facts.says("sliding_window") { facts.window()? } else { Some(4096) };
    if let Some(window) = window.filter(|&window| window > 0) {
        shape.context = shape.context.min(window);
    }
    Ok(shape)
}
