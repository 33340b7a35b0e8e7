//! Requests as OpenTelemetry spans, sent by OTLP over HTTP; only with the feature `otlp`, and only
//! where the standard environment names a collector. A span says what the request's line in the log
//! says, and nothing that was said in the request.

use std::env;
use std::time::{Duration, SystemTime};

use opentelemetry::trace::{
    Span as _, SpanContext, SpanId, Status, TraceContextExt, TraceFlags, TraceId, TraceState,
    Tracer as _, TracerProvider as _,
};
use opentelemetry::{Context, KeyValue, global};
use opentelemetry_http::{Bytes, HttpClient, HttpError, Request, Response};
use opentelemetry_otlp::{Protocol, SpanExporter, WithExportConfig, WithHttpConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::SdkTracerProvider;
use tracing::Subscriber;
use tracing::field::Empty;
use tracing_opentelemetry::OpenTelemetrySpanExt;
use tracing_subscriber::Layer;
use tracing_subscriber::filter::filter_fn;
use tracing_subscriber::registry::LookupSpan;

use super::Ended;
use super::request_log::End;
use super::trace::Parent;
use crate::model::ModelTask;

/// Of all spans: logs leave this target out.
pub const TARGET: &str = "sconce::trace";

/// As the name of the service where the environment gives none, and of the instrumentation.
const NAME: &str = "sconce";

/// How long the last spans may take: a drain has a second left when it ends.
const LAST_EXPORT_MAX: Duration = Duration::from_secs(1);

/// The standard's own default.
const EXPORT_MS: u64 = 10_000;

/// Largest answer of a collector that is read.
const ANSWER_BYTES_MAX: u64 = 1 << 20;

/// Where spans go. Dropping it sends what is left.
#[derive(Debug)]
pub struct Exporter(SdkTracerProvider);

/// The span of one request.
#[derive(Debug)]
pub(super) struct RequestSpan(tracing::Span);

/// What the exporter posts with: the HTTP client that this program has anyway.
#[derive(Debug)]
struct Client(ureq::Agent);

/// The layer that makes spans of [`TARGET`], and where they go; none without a collector in
/// `OTEL_EXPORTER_OTLP_ENDPOINT` or `OTEL_EXPORTER_OTLP_TRACES_ENDPOINT`, or with
/// `OTEL_SDK_DISABLED=true` or `OTEL_TRACES_EXPORTER=none`.
///
/// # Errors
/// A part of that environment that cannot be used.
pub fn start<S>() -> Result<Option<(impl Layer<S>, Exporter)>, String>
where
    S: Subscriber + for<'span> LookupSpan<'span>,
{
    let set = |name: &str| env::var(name).ok().filter(|value| !value.is_empty());
    let is = |name, word| set(name).is_some_and(|value| value.eq_ignore_ascii_case(word));
    let [general, traces] = ["OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"];
    let nowhere = set(general).is_none() && set(traces).is_none();
    if nowhere || is("OTEL_SDK_DISABLED", "true") || is("OTEL_TRACES_EXPORTER", "none") {
        return Ok(None);
    }
    let mut resource = Resource::builder();
    let attributes = set("OTEL_RESOURCE_ATTRIBUTES").unwrap_or_default();
    if set("OTEL_SERVICE_NAME").is_none() && !attributes.contains("service.name=") {
        resource = resource.with_service_name(NAME);
    }
    let version = KeyValue::new("service.version", env!("CARGO_PKG_VERSION"));
    let mut exporter = SpanExporter::builder().with_http().with_http_client(Client::new());
    let protocols = ["OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"];
    if protocols.into_iter().all(|name| set(name).is_none()) {
        // As the specification says; the library's own default is whatever was compiled.
        exporter = exporter.with_protocol(Protocol::HttpBinary);
    }
    let provider = SdkTracerProvider::builder()
        .with_batch_exporter(exporter.build().map_err(|error| error.to_string())?)
        .with_resource(resource.with_attribute(version).build())
        .build();
    global::set_tracer_provider(provider.clone());
    let layer = tracing_opentelemetry::layer()
        .with_tracer(provider.tracer(NAME))
        .with_location(false)
        .with_threads(false)
        .with_level(false)
        .with_target(false)
        .with_tracked_inactivity(false)
        .with_filter(filter_fn(|metadata| metadata.target() == TARGET));
    Ok(Some((layer, Exporter(provider))))
}

impl Drop for Exporter {
    fn drop(&mut self) {
        if let Err(error) = self.0.shutdown_with_timeout(LAST_EXPORT_MAX) {
            tracing::warn!(%error, "the last spans were not sent");
        }
    }
}

impl RequestSpan {
    /// A request to `route` begins; none if nobody wants spans.
    pub(super) fn begin(route: &str, parent: Option<&Parent>, state: Option<&str>) -> Option<Self> {
        let span = tracing::info_span!(
            target: TARGET,
            parent: None,
            "request",
            otel.name = route,
            otel.kind = "server",
            otel.status_code = Empty,
        );
        if span.is_disabled() {
            return None;
        }
        if let Some(context) = parent.and_then(|parent| remote(parent, state)) {
            // It is new, so it takes a parent.
            let _ = span.set_parent(Context::new().with_remote_span_context(context));
        }
        // Where the layer is missing a span may count as enabled, and has no place in a trace.
        let known = span.context().span().span_context().is_valid();
        known.then(|| Self(span))
    }

    /// What goes on from here.
    pub(super) fn parent(&self) -> Option<Parent> {
        let context = self.0.context();
        let span = context.span().span_context().clone();
        let flags = span.trace_flags().to_u8();
        Parent::parse(&format!("00-{}-{}-{flags:02x}", span.trace_id(), span.span_id()))
    }

    /// The request is over; it began at `began`.
    pub(super) fn end(&self, began: SystemTime, status: Option<u16>, end: Option<&End>) {
        if let Some(status) = status {
            self.0.set_attribute("http.response.status_code", i64::from(status));
            if status >= 500 {
                self.0.set_status(Status::error(""));
            }
        }
        let Some(end) = end else { return };
        let report = &end.report;
        for (key, value) in [
            ("gen_ai.provider.name", NAME),
            ("gen_ai.request.model", &end.model),
            ("sconce.task", report.task.as_str()),
            ("sconce.outcome", report.ended.as_str()),
            ("sconce.tenant", &end.tenant),
        ] {
            self.0.set_attribute(key, value.to_owned());
        }
        for (key, tokens) in [
            ("gen_ai.usage.input_tokens", report.usage.prompt_tokens),
            ("gen_ai.usage.cache_read.input_tokens", report.usage.cached_tokens),
            ("gen_ai.usage.output_tokens", report.usage.generated_tokens),
        ] {
            self.0.set_attribute(key, i64::from(tokens));
        }
        if let Ended::Failed(kind) = report.ended {
            self.0.set_attribute("error.type", kind.code());
        }
        self.parts(began, end);
    }

    /// Where the time went, as spans below this one.
    fn parts(&self, began: SystemTime, end: &End) {
        let context = self.0.context();
        let tracer = global::tracer(NAME);
        let part = |name: &'static str, from: Duration, until: Duration| {
            let span = tracer.span_builder(name).with_start_time(began + from);
            let mut span = span.start_with_context(&tracer, &context);
            span.end_with_timestamp(began + until.max(from));
        };
        let micros = |time: crate::request::Micros| Duration::from_micros(time.0);
        let whole = end.report.duration;
        let Some(waited) = end.queue_wait.map(micros) else { return };
        part("queue", Duration::ZERO, waited);
        match (end.report.task, end.first_token.map(micros)) {
            (ModelTask::Generate, Some(first)) => {
                part("prefill", waited, first);
                part("decode", first, whole);
            }
            (ModelTask::Generate, None) => part("prefill", waited, whole),
            _ => part("encode", waited, whole),
        }
    }
}

/// A caller's span as a parent.
fn remote(parent: &Parent, state: Option<&str>) -> Option<SpanContext> {
    let mut parts = parent.header().split('-').skip(1);
    let trace = TraceId::from_hex(parts.next()?).ok()?;
    let span = SpanId::from_hex(parts.next()?).ok()?;
    let flags = u8::from_str_radix(parts.next()?, 16).ok()?;
    let state = state.and_then(|state| state.parse::<TraceState>().ok()).unwrap_or_default();
    Some(SpanContext::new(trace, span, TraceFlags::new(flags), true, state))
}

impl Client {
    fn new() -> Self {
        let named = ["OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "OTEL_EXPORTER_OTLP_TIMEOUT"];
        let mut given = named.iter().filter_map(|name| env::var(name).ok()?.parse().ok());
        let limit = Duration::from_millis(given.next().unwrap_or(EXPORT_MS));
        let config =
            ureq::Agent::config_builder().http_status_as_error(false).timeout_global(Some(limit));
        Self(config.build().into())
    }
}

#[async_trait::async_trait]
impl HttpClient for Client {
    /// Blocks: the exporter has a thread of its own.
    async fn send_bytes(&self, request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
        let (head, body) = request.into_parts();
        let mut answer = self.0.run(Request::from_parts(head, body.to_vec()))?;
        let bytes = answer.body_mut().with_config().limit(ANSWER_BYTES_MAX).read_to_vec()?;
        let (head, _) = answer.into_parts();
        Ok(Response::from_parts(head, bytes.into()))
    }
}
