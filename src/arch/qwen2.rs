//! Qwen2 and 2.5: Llama with biases on q, k and v, and with rotated pairs half a head apart in GGUF
//! files too.

use crate::arch::Description;
use crate::arch::decoder::Shape;
use crate::arch::facts::Facts;
use crate::weights::LoadError;

pub(super) fn shape(description: &Description<'_>) -> Result<Shape, LoadError> {
    let mut shape = Shape::read(description)?;
    shape.qkv_bias = true;
    limit_to_window(&mut shape, description)?;
    Ok(shape)
}

/// Where some layers have a sliding window, it limits the context. The key alone means nothing.
pub(super) fn limit_to_window(
    shape: &mut Shape,
    description: &Description<'_>,
) -> Result<(), LoadError> {
    let facts = Facts::new(description)?;
    if facts.flag("use_sliding_window") == Some(true)
        && let Some(window) = facts.window()?.filter(|&window| window > 0)
    {
        shape.context = shape.context.min(window);
    }
    Ok(())
}
