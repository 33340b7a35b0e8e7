//! The tensors of an inference request: JSON, or JSON followed by binary text. Only text comes in.

use axum::extract::Request;
use axum::http::HeaderMap;
use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::Value;

use crate::admission::Front;
use crate::admission::ticket::Ticket;
use crate::error::{Error, Result};
use crate::http::body;
use crate::http::object::Object;

/// Says how many bytes of the body are JSON; the rest is binary.
const HEADER_LENGTH: &str = "inference-header-content-length";

/// A request, its texts put in place.
#[derive(Debug)]
pub(super) struct Question {
    pub(super) id: Option<String>,
    /// Whether inputs that are too long are cut.
    pub(super) truncate: bool,
    pub(super) inputs: Vec<(String, Vec<String>)>,
    /// Names of the outputs that are wanted; none means all.
    pub(super) outputs: Vec<String>,
}

#[derive(Debug, Deserialize, JsonSchema)]
#[schemars(rename = "InferenceRequest")]
pub(super) struct Body {
    #[serde(default)]
    id: Option<String>,
    #[serde(default)]
    parameters: Option<Object<Parameters>>,
    inputs: Vec<Object<Input>>,
    #[serde(default)]
    outputs: Option<Vec<Object<Named>>>,
}

#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(default)]
#[schemars(rename = "InferenceParameters")]
struct Parameters {
    truncate: Option<bool>,
    /// Of an input whose texts follow the JSON, each with its length in four bytes before it.
    binary_data_size: Option<usize>,
}

#[derive(Debug, Deserialize, JsonSchema)]
#[schemars(rename = "InputTensor")]
struct Input {
    name: String,
    shape: Vec<u64>,
    #[schemars(extend("const" = "BYTES"))]
    datatype: String,
    /// A text, or texts in lists.
    #[serde(default)]
    data: Option<Value>,
    #[serde(default)]
    parameters: Option<Object<Parameters>>,
}

#[derive(Debug, Deserialize, JsonSchema)]
#[schemars(rename = "RequestedOutput")]
struct Named {
    name: String,
}

/// Reads and checks a request.
///
/// # Errors
/// `InvalidRequest` for what is no request of this protocol, or holds other tensors than text.
pub(super) async fn read(front: &Front, ticket: &mut Ticket, request: Request) -> Result<Question> {
    let (headers, bytes) = body::whole(front, ticket, request).await?;
    let json = json_length(&headers, bytes.len())?;
    if json.is_none() {
        body::check_content_type(&headers)?;
    }
    let mut head = bytes;
    let tail = head.split_off(json.unwrap_or(head.len()));
    let body: Body = body::parse(front, head).await?;
    let mut rest = &tail[..];
    let mut inputs = Vec::new();
    for Object(input) in body.inputs {
        let texts = input.texts(&mut rest)?;
        inputs.push((input.name, texts));
    }
    if !rest.is_empty() {
        return Err(wrong(format!("{} bytes belong to no input", rest.len())));
    }
    let outputs = body.outputs.into_iter().flatten().map(|Object(output)| output.name).collect();
    let truncate = body.parameters.and_then(|Object(parameters)| parameters.truncate);
    Ok(Question { id: body.id, truncate: truncate.unwrap_or(false), inputs, outputs })
}

/// The texts of the input `name`.
///
/// # Errors
/// `InvalidRequest` if there is none of that name.
pub(super) fn take(inputs: &mut Vec<(String, Vec<String>)>, name: &str) -> Result<Vec<String>> {
    let at = inputs.iter().position(|(known, _)| known == name);
    let at = at.ok_or_else(|| wrong(format!("there is no input '{name}'")))?;
    Ok(inputs.swap_remove(at).1)
}

fn json_length(headers: &HeaderMap, whole: usize) -> Result<Option<usize>> {
    let Some(given) = headers.get(HEADER_LENGTH) else { return Ok(None) };
    let length = given.to_str().ok().and_then(|given| given.parse::<usize>().ok());
    match length.filter(|&length| length <= whole) {
        Some(length) => Ok(Some(length)),
        None => Err(wrong(format!("{HEADER_LENGTH} is no number up to the body's {whole} bytes"))),
    }
}

fn wrong(message: String) -> Error {
    Error::invalid("inputs", message)
}

impl Input {
    /// Its texts; binary ones are taken off the front of `rest`.
    fn texts(&self, rest: &mut &[u8]) -> Result<Vec<String>> {
        let name: String = self.name.chars().take(80).collect();
        if self.datatype != "BYTES" {
            return Err(wrong(format!("input '{name}' has to be of datatype BYTES: text")));
        }
        let mut texts = Vec::new();
        let parameters = self.parameters.as_ref();
        match (&self.data, parameters.and_then(|Object(given)| given.binary_data_size)) {
            (Some(data), None) => flatten(data, &mut texts, 0)?,
            (None, Some(size)) => {
                let Some((own, after)) = rest.split_at_checked(size) else {
                    return Err(wrong(format!("input '{name}' has fewer than {size} bytes")));
                };
                *rest = after;
                texts = unpack(own, &name)?;
            }
            _ => {
                let message = format!("input '{name}' needs either data or binary_data_size");
                return Err(wrong(message));
            }
        }
        let said = self.shape.iter().try_fold(1u64, |product, &size| product.checked_mul(size));
        if said != Some(texts.len() as u64) {
            let (count, shape) = (texts.len(), &self.shape);
            return Err(wrong(format!(
                "input '{name}' has {count} texts, not a shape of {shape:?}"
            )));
        }
        Ok(texts)
    }
}

/// Texts of nested lists, in order.
fn flatten(data: &Value, texts: &mut Vec<String>, depth: usize) -> Result<()> {
    match data {
        Value::String(text) => texts.push(text.clone()),
        Value::Array(items) if depth < 4 => {
            items.iter().try_for_each(|item| flatten(item, texts, depth + 1))?;
        }
        _ => return Err(wrong("data has to be text, or lists of text".to_owned())),
    }
    Ok(())
}

/// Texts as Triton's clients pack them: four bytes of length, little-endian, before each.
fn unpack(mut bytes: &[u8], name: &str) -> Result<Vec<String>> {
    let mut texts = Vec::new();
    while !bytes.is_empty() {
        let cut = || wrong(format!("input '{name}' ends within a text"));
        let (length, rest) = bytes.split_first_chunk::<4>().ok_or_else(cut)?;
        let length = u32::from_le_bytes(*length) as usize;
        let (text, rest) = rest.split_at_checked(length).ok_or_else(cut)?;
        let text = std::str::from_utf8(text)
            .map_err(|_| wrong(format!("text {} of input '{name}' is not UTF-8", texts.len())))?;
        texts.push(text.to_owned());
        bytes = rest;
    }
    Ok(texts)
}
