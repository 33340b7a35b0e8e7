//! Qwen3: Qwen2 without biases, with q and k normalised head by head.

use crate::arch::Description;
use crate::arch::decoder::Shape;
use crate::arch::qwen2::limit_to_window;
use crate::weights::LoadError;

pub(super) fn shape(description: &Description<'_>) -> Result<Shape, LoadError> {
    let mut shape = Shape::read(description)?;
    shape.head_norms = true;
    limit_to_window(&mut shape, description)?;
    Ok(shape)
}
