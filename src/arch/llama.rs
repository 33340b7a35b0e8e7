//! Llama 1 to 3, and what goes by its name: SmolLM2, TinyLlama, and most of what GGUF files call
//! `llama`, Mistral included.

use crate::arch::Description;
use crate::arch::decoder::Shape;
use crate::weights::LoadError;

pub(super) fn shape(description: &Description<'_>) -> Result<Shape, LoadError> {
    Ok(Shape::read(description)?.with_interleaved_gguf())
}
