//! A request's place in somebody's trace, as W3C Trace Context has it. Without the feature `otlp` a
//! trace is noted and passed on as it came; with it, the request is a span of it.

use std::time::SystemTime;

use super::request_log::End;

/// A valid `traceparent` of a caller.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Parent(String);

/// Where a request stands.
#[derive(Debug, Default)]
pub struct Trace {
    parent: Option<Parent>,
    #[cfg(feature = "otlp")]
    span: Option<super::otlp::RequestSpan>,
}

impl Parent {
    /// Reads a header's value; none for one that the specification says to ignore.
    pub fn parse(text: &str) -> Option<Self> {
        let hex = |part: &str, length: usize| {
            let digit = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
            part.len() == length && part.bytes().all(digit)
        };
        let mut parts = text.split('-');
        let [version, trace, span, flags] = std::array::from_fn(|_| parts.next().unwrap_or(""));
        let valid = hex(version, 2) && hex(trace, 32) && hex(span, 16) && hex(flags, 2);
        let named = trace.bytes().any(|byte| byte != b'0') && span.bytes().any(|byte| byte != b'0');
        // Later versions may say more; this one may not.
        let whole = match version {
            "ff" => false,
            "00" => parts.next().is_none(),
            _ => true,
        };
        (valid && named && whole).then(|| Self(format!("00-{trace}-{span}-{flags}")))
    }

    /// 32 hexadecimal digits.
    pub fn trace_id(&self) -> &str {
        &self.0[3..35]
    }

    /// As a header.
    pub fn header(&self) -> &str {
        &self.0
    }
}

impl Trace {
    /// A request to `route` begins; `state` is the caller's `tracestate`.
    #[cfg_attr(not(feature = "otlp"), expect(unused_variables, reason = "there are no spans"))]
    pub fn begin(route: &str, parent: Option<Parent>, state: Option<&str>) -> Self {
        Self {
            #[cfg(feature = "otlp")]
            span: super::otlp::RequestSpan::begin(route, parent.as_ref(), state),
            parent,
        }
    }

    /// For logs.
    pub fn id(&self) -> Option<String> {
        self.passed_on().map(|parent| parent.trace_id().to_owned())
    }

    /// What goes on from here: in the answer, and to whatever this request causes.
    pub fn passed_on(&self) -> Option<Parent> {
        #[cfg(feature = "otlp")]
        if let Some(span) = &self.span {
            return span.parent();
        }
        self.parent.clone()
    }

    /// The request is over; it began at `began`.
    #[cfg_attr(not(feature = "otlp"), expect(unused_variables, reason = "there are no spans"))]
    pub(super) fn end(&self, began: SystemTime, status: Option<u16>, end: Option<&End>) {
        #[cfg(feature = "otlp")]
        if let Some(span) = &self.span {
            span.end(began, status, end);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_traceparent_is_what_the_specification_says() {
        let good = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
        let parent = Parent::parse(good).expect("the specification's own example");
        assert_eq!(parent.trace_id(), "4bf92f3577b34da6a3ce929d0e0e4736");
        assert_eq!(parent.header(), good);
        let later = good.replacen("00", "cc", 1) + "-what-the-future-will-be-like";
        assert_eq!(Parent::parse(&later), Some(parent));
        for bad in [
            "",
            "00",
            &good[1..],
            &good.to_uppercase(),
            &format!("{good}-more"),
            &format!("{good}0"),
            &good.replacen("00", "ff", 1),
            &good.replace("4bf92f3577b34da6a3ce929d0e0e4736", &"0".repeat(32)),
            &good.replace("00f067aa0ba902b7", &"0".repeat(16)),
            &good.replace("a6a3", "g6a3"),
            &good.replace('-', "_"),
        ] {
            assert_eq!(Parent::parse(bad), None, "{bad}");
        }
    }
}
