//! What completions and embeddings are asked about: text, texts, token ids, or lists of token
//! ids. Parsed without a tree in between.

use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::Deserialize;
use serde::de::{self, Deserializer, SeqAccess, Visitor};

use crate::admission::Front;
use crate::error::Error;
use crate::request::TokenId;
use crate::text::ModelText;

/// One input or several, as text or as token ids.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Input {
    Text(String),
    Texts(Vec<String>),
    Tokens(Vec<TokenId>),
    TokenLists(Vec<Vec<TokenId>>),
}

impl Input {
    /// Token ids of every input as a prompt; `param` is the field that they came in. They may be
    /// more than `limit`: only text that cannot fit is refused here.
    ///
    /// # Errors
    /// `InvalidRequest` for an empty input or a token id that the model does not have,
    /// `ContextLengthExceeded` for text that cannot fit.
    pub(super) async fn encode_prompts(
        self,
        front: &Front,
        text: &ModelText,
        limit: u32,
        param: &'static str,
    ) -> crate::error::Result<Vec<Arc<[TokenId]>>> {
        let (texts, lists) = match self {
            Input::Text(text) => (vec![text], vec![]),
            Input::Texts(texts) => (texts, vec![]),
            Input::Tokens(tokens) => (vec![], vec![tokens]),
            Input::TokenLists(lists) => (vec![], lists),
        };
        if texts.is_empty() && lists.is_empty() {
            return Err(Error::invalid(param, format!("'{param}' is an empty array")));
        }
        let empty = texts.iter().position(String::is_empty);
        if let Some(index) = empty.or_else(|| lists.iter().position(Vec::is_empty)) {
            return Err(Error::invalid(param, format!("'{param}' has an empty input ({index})")));
        }
        check_ids(text, &lists, param)?;
        if texts.is_empty() {
            return Ok(lists.into_iter().map(Arc::from).collect());
        }
        front.encode_prompts(text, texts, limit).await
    }

    /// The inputs, unless they are token ids.
    pub(super) fn texts(&self) -> Option<Vec<String>> {
        match self {
            Input::Text(text) => Some(vec![text.clone()]),
            Input::Texts(texts) => Some(texts.clone()),
            Input::Tokens(_) | Input::TokenLists(_) => None,
        }
    }

    /// Whether there is no input, or one without anything in it.
    pub(super) fn has_empty(&self) -> bool {
        match self {
            Input::Text(text) => text.is_empty(),
            Input::Texts(texts) => texts.is_empty() || texts.iter().any(String::is_empty),
            Input::Tokens(tokens) => tokens.is_empty(),
            Input::TokenLists(lists) => lists.is_empty() || lists.iter().any(Vec::is_empty),
        }
    }

    /// Characters of all texts.
    pub(super) fn characters(&self) -> usize {
        match self {
            Input::Text(text) => text.chars().count(),
            Input::Texts(texts) => texts.iter().map(|text| text.chars().count()).sum(),
            Input::Tokens(_) | Input::TokenLists(_) => 0,
        }
    }

    /// Number of inputs.
    pub(super) fn len(&self) -> usize {
        match self {
            Input::Text(_) | Input::Tokens(_) => 1,
            Input::Texts(texts) => texts.len(),
            Input::TokenLists(lists) => lists.len(),
        }
    }
}

/// Whether the model has all these tokens.
///
/// # Errors
/// `InvalidRequest`, naming the first that it has not.
pub(super) fn check_ids(
    text: &ModelText,
    lists: &[Vec<TokenId>],
    param: &'static str,
) -> crate::error::Result<()> {
    let vocabulary = text.tokenizer.vocab_size();
    let Some(id) = lists.iter().flatten().find(|&&id| id as usize >= vocabulary) else {
        return Ok(());
    };
    let message = format!(
        "token id {id} is not one of this model's {vocabulary}: these ids are another \
         tokenizer's; send text instead (in LangChain: check_embedding_ctx_length=False)"
    );
    Err(Error::invalid(param, message))
}

/// One element of the array form.
enum Item {
    Text(String),
    Token(TokenId),
    Tokens(Vec<TokenId>),
}

impl JsonSchema for Input {
    fn schema_name() -> Cow<'static, str> {
        "Input".into()
    }

    fn json_schema(schemas: &mut SchemaGenerator) -> Schema {
        let (id, text) = (schemas.subschema_for::<TokenId>(), schemas.subschema_for::<Text>());
        let list = |items: &Schema| json_schema!({"type": "array", "minItems": 1, "items": items});
        let ids = list(&id);
        json_schema!({"anyOf": [text, list(&text), ids, list(&ids)]})
    }
}

/// A text with something in it.
#[derive(JsonSchema)]
#[schemars(inline)]
struct Text(
    #[schemars(length(min = 1))]
    #[expect(dead_code, reason = "for its schema")]
    String,
);

impl<'de> Deserialize<'de> for Input {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(InputVisitor)
    }
}

struct InputVisitor;

impl<'de> Visitor<'de> for InputVisitor {
    type Value = Input;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a string, an array of strings, of token ids, or of arrays of token ids")
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<Input, E> {
        Ok(Input::Text(text.to_owned()))
    }

    fn visit_string<E: de::Error>(self, text: String) -> Result<Input, E> {
        Ok(Input::Text(text))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Input, A::Error> {
        match items.next_element::<Item>()? {
            None => Ok(Input::Texts(Vec::new())),
            Some(Item::Text(first)) => Ok(Input::Texts(rest(first, items)?)),
            Some(Item::Token(first)) => Ok(Input::Tokens(rest(first, items)?)),
            Some(Item::Tokens(first)) => Ok(Input::TokenLists(rest(first, items)?)),
        }
    }
}

/// The other elements are of the first one's type.
fn rest<'de, T: Deserialize<'de>, A: SeqAccess<'de>>(
    first: T,
    mut items: A,
) -> Result<Vec<T>, A::Error> {
    let mut all = vec![first];
    while let Some(item) = items.next_element()? {
        all.push(item);
    }
    Ok(all)
}

impl<'de> Deserialize<'de> for Item {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ItemVisitor)
    }
}

struct ItemVisitor;

impl<'de> Visitor<'de> for ItemVisitor {
    type Value = Item;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a string, a token id, or an array of token ids")
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<Item, E> {
        Ok(Item::Text(text.to_owned()))
    }

    fn visit_string<E: de::Error>(self, text: String) -> Result<Item, E> {
        Ok(Item::Text(text))
    }

    fn visit_u64<E: de::Error>(self, id: u64) -> Result<Item, E> {
        let id = TokenId::try_from(id).map_err(|_| {
            E::invalid_value(de::Unexpected::Unsigned(id), &"a token id of 32 bits")
        })?;
        Ok(Item::Token(id))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Item, A::Error> {
        let mut tokens = Vec::new();
        while let Some(token) = items.next_element()? {
            tokens.push(token);
        }
        Ok(Item::Tokens(tokens))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(json: &str) -> Result<Input, String> {
        serde_json::from_str(json).map_err(|error| error.to_string())
    }

    #[test]
    fn every_form_parses() {
        assert_eq!(parse(r#""a""#), Ok(Input::Text("a".into())));
        assert_eq!(parse(r#""\u00e9""#), Ok(Input::Text("é".into())));
        assert_eq!(parse(r#"["a","b"]"#), Ok(Input::Texts(vec!["a".into(), "b".into()])));
        assert_eq!(parse("[1,2]"), Ok(Input::Tokens(vec![1, 2])));
        assert_eq!(parse("[[1],[2,3]]"), Ok(Input::TokenLists(vec![vec![1], vec![2, 3]])));
        assert_eq!(parse("[]"), Ok(Input::Texts(vec![])));
        assert_eq!(parse("[[]]"), Ok(Input::TokenLists(vec![vec![]])));
    }

    #[test]
    fn mixed_and_wrong_types_are_named() {
        for wrong in [r#"["a",1]"#, "[1,[2]]", "[1,-1]", "[1.5]", "[4294967296]", "5", "{}", "null"]
        {
            let error = parse(wrong).expect_err(wrong);
            assert!(error.contains("expected") || error.contains("token id"), "{wrong}: {error}");
        }
    }
}
