//! From hidden rows to answers: language-model head, pooling.
