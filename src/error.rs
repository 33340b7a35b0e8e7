//! What can go wrong with a request: whose fault it is, whether trying again can help, and when.
//! Knows nothing of HTTP; `http/error.rs` is the one place that turns this into a status code.

use std::borrow::Cow;
use std::fmt;
use std::time::Duration;

/// The result of anything a request can fail at.
pub type Result<T> = std::result::Result<T, Error>;

/// A failure that ends a request, with everything its caller needs to act on it.
#[derive(Debug, Clone)]
pub struct Error {
    kind: ErrorKind,
    message: String,
    param: Option<Cow<'static, str>>,
    retry_after: Option<Duration>,
}

/// The cases that callers can tell apart. Each has one code and one answer to "try again?".
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// Malformed or out-of-range input.
    InvalidRequest,
    /// A field that is understood and not served yet: refused, never ignored in silence.
    Unsupported,
    /// More tokens than the model's context or input limit.
    ContextLengthExceeded,
    /// No API key, or none of ours.
    Unauthorized,
    /// The body did not arrive in time.
    RequestTimeout,
    /// A body or a list above its limit.
    TooLarge,
    /// No such model.
    ModelNotFound,
    /// No such path, or not with this method.
    NotFound,
    /// The queue is full, or the predicted wait is too long.
    QueueFull,
    /// A tenant is over its own limit.
    RateLimited,
    /// The server is shutting down.
    Draining,
    /// The model is not loaded yet.
    ModelLoading,
    /// The device or the engine is gone; the process is about to end.
    DeviceFailed,
    /// The step that carried this request failed; others go on.
    StepFailed,
    /// The request's deadline passed while it waited.
    DeadlineExceeded,
    /// The drain deadline cut the answer off.
    Cut,
    /// A defect of ours.
    Internal,
}

/// Whose fault a failure is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The caller's: the same request will fail again.
    Caller,
    /// Nobody's: too much at once.
    Load,
    /// The server's state or a defect.
    Server,
}

impl Error {
    /// An error of `kind`; `message` says what, the measured value, the limit and the key that
    /// changes it, wherever these exist.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), param: None, retry_after: None }
    }

    /// Malformed input, with the name of the offending field.
    pub fn invalid(param: &'static str, message: impl Into<String>) -> Self {
        Self::new(ErrorKind::InvalidRequest, message).at(param)
    }

    /// What was in flight is told when the engine or its device cannot go on.
    pub fn device_failed() -> Self {
        let message = "the device failed and the server is restarting; try again";
        Self::new(ErrorKind::DeviceFailed, message)
    }

    /// What was in flight is told when the drain's time is over.
    pub fn cut() -> Self {
        let message = "the server is shutting down and its grace period is over; try again";
        Self::new(ErrorKind::Cut, message)
    }

    /// Names the field that is at fault.
    #[must_use]
    pub fn at(mut self, param: impl Into<Cow<'static, str>>) -> Self {
        self.param = Some(param.into());
        self
    }

    /// Says when to try again.
    #[must_use]
    pub fn retry_after(mut self, wait: Duration) -> Self {
        self.retry_after = Some(wait);
        self
    }

    /// The case.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// What a person reads.
    pub fn message(&self) -> &str {
        &self.message
    }

    /// The offending request field.
    pub fn param(&self) -> Option<&str> {
        self.param.as_deref()
    }

    /// How long to wait before the next try.
    pub fn wait(&self) -> Option<Duration> {
        self.retry_after
    }

    /// Whether the same request can succeed later or elsewhere.
    pub fn retryable(&self) -> bool {
        self.kind.retryable()
    }
}

impl ErrorKind {
    /// Whose fault this is.
    pub fn fault(self) -> Fault {
        use ErrorKind::*;
        match self {
            InvalidRequest
            | Unsupported
            | Unauthorized
            | RequestTimeout
            | ContextLengthExceeded
            | TooLarge
            | ModelNotFound
            | NotFound => Fault::Caller,
            QueueFull | RateLimited | DeadlineExceeded => Fault::Load,
            Draining | ModelLoading | DeviceFailed | StepFailed | Cut | Internal => Fault::Server,
        }
    }

    /// Whether the same request can succeed later or elsewhere.
    pub fn retryable(self) -> bool {
        use ErrorKind::*;
        matches!(
            self,
            QueueFull | RateLimited | Draining | ModelLoading | DeviceFailed | StepFailed | Cut
        )
    }

    /// The stable string that clients match on.
    pub fn code(self) -> &'static str {
        use ErrorKind::*;
        match self {
            InvalidRequest => "invalid_request",
            Unsupported => "unsupported",
            ContextLengthExceeded => "context_length_exceeded",
            Unauthorized => "invalid_api_key",
            RequestTimeout => "request_timeout",
            TooLarge => "too_large",
            ModelNotFound => "model_not_found",
            NotFound => "not_found",
            QueueFull => "queue_full",
            RateLimited => "rate_limit_exceeded",
            Draining => "draining",
            ModelLoading => "model_loading",
            DeviceFailed => "device_failed",
            StepFailed => "step_failed",
            DeadlineExceeded => "deadline_exceeded",
            Cut => "cut_by_drain",
            Internal => "internal_error",
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.message)
    }
}

impl std::error::Error for Error {}
