//! The end of a path that names a model and perhaps what is asked of it. Knows no route.

use std::convert::Infallible;

use axum::extract::{FromRequestParts, MatchedPath, Path};
use axum::http::request::Parts;

/// What a route's wildcard stands for. Where that is no text it is left as it was written, and
/// names nothing: so each API words the refusal as its own.
#[derive(Debug)]
pub(super) struct Tail(pub(super) String);

impl<S: Send + Sync> FromRequestParts<S> for Tail {
    type Rejection = Infallible;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Infallible> {
        if let Ok(Path(tail)) = Path::<String>::from_request_parts(parts, state).await {
            return Ok(Self(tail));
        }
        let before = parts.extensions.get::<MatchedPath>().and_then(|path| path.as_str().find('{'));
        let tail = before.and_then(|before| parts.uri.path().get(before..));
        Ok(Self(tail.unwrap_or_default().to_owned()))
    }
}
