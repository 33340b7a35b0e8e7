//! From messages to a prompt. A template sees message content as text; that no content becomes a
//! control token is decided here, not by the template.

use std::borrow::Cow;
use std::collections::HashSet;
use std::io;

use minijinja::value::Value;
use minijinja::{ErrorKind, context};

use super::control::mark;
use super::jinja::environment;
use super::literal::Part;
use super::{ChatTemplate, Message, TextError, Tokenizer};
use crate::error::{Error, Result};
use crate::request::TokenId;

/// Longest template.
const TEMPLATE_BYTES_MAX: usize = 1 << 20;
/// Work that one rendering may take: an instruction is one unit, and so are 64 bytes made on the
/// way. The known templates take some tens of units a message, and pass on each byte some ten
/// times.
const WORK_MAX: u64 = 2_000_000;
/// Longest rendered prompt.
const PROMPT_BYTES_MAX: usize = 16 << 20;

const NAME: &str = "chat";
/// Where sentinels are taken from: private-use characters, which no control token has.
const SENTINELS: std::ops::RangeInclusive<char> = '\u{f0000}'..='\u{ffffd}';

impl ChatTemplate {
    /// A template from its source; `begin` and `end` are the texts of the tokens that it knows as
    /// `bos_token` and `eos_token`.
    ///
    /// # Errors
    /// It is too long or does not compile.
    pub fn new(source: &str, begin: &str, end: &str) -> std::result::Result<Self, TextError> {
        if source.len() > TEMPLATE_BYTES_MAX {
            return Err(TextError(format!(
                "a chat template of {} bytes; the limit is {TEMPLATE_BYTES_MAX}",
                source.len()
            )));
        }
        let environment = environment(NAME, source, WORK_MAX)
            .map_err(|error| TextError(format!("the chat template does not compile: {error}")))?;
        Ok(Self { environment, begin: begin.to_owned(), end: end.to_owned() })
    }

    /// Whether the template may look at something of this name.
    pub fn mentions(&self, name: &str) -> bool {
        let template = self.environment.get_template(NAME);
        template.is_ok_and(|template| template.source().contains(name))
    }

    /// The prompt of a conversation, ending with the generation prompt. Control tokens come from
    /// the template alone, never from message content.
    ///
    /// Content is left as it is unless part of it could be read as a control token, or as the
    /// beginning or end of one; there a sentinel character goes in. After rendering, the text is
    /// cut at the control tokens that are found, which no sentinel interrupts, and the stretches
    /// between are encoded as plain text without their sentinels. A template that takes characters
    /// out of the middle of content could still undo this; none is known.
    ///
    /// # Errors
    /// A role is not a known one, the template refuses the messages, or they are more than the
    /// limits allow.
    pub fn render(&self, tokenizer: &Tokenizer, messages: &[Message]) -> Result<Vec<TokenId>> {
        self.render_with(tokenizer, messages, &[])
    }

    /// As [`ChatTemplate::render`], with switches that the template may look at, such as
    /// `enable_thinking`.
    ///
    /// # Errors
    /// As [`ChatTemplate::render`].
    pub fn render_with(
        &self,
        tokenizer: &Tokenizer,
        messages: &[Message],
        flags: &[(&'static str, bool)],
    ) -> Result<Vec<TokenId>> {
        let controls = &tokenizer.controls;
        let cuts: Vec<_> = messages.iter().map(|message| controls.cuts(&message.content)).collect();
        let honest = cuts.iter().all(Vec::is_empty);
        let sentinel = if honest { None } else { Some(self.sentinel(messages)?) };
        let marked: Vec<_> = messages
            .iter()
            .zip(&cuts)
            .map(|(message, cuts)| mark(&message.content, cuts, sentinel.unwrap_or_default()))
            .collect();
        let given = messages
            .iter()
            .zip(&marked)
            .map(|(message, content)| Ok(context! { role => role(&message.role)?, content }))
            .collect::<Result<Vec<_>>>()?;
        let prompt = self.text(given, flags)?;

        let mut ids = Vec::with_capacity(prompt.len() / 3 + 1);
        for part in controls.literals().parts(&prompt) {
            let text = match (part, sentinel) {
                (Part::Token(id), _) => {
                    ids.push(id);
                    continue;
                }
                (Part::Text(text), Some(sentinel)) if text.contains(sentinel) => {
                    Cow::Owned(text.replace(sentinel, ""))
                }
                (Part::Text(text), _) => Cow::Borrowed(text),
            };
            ids.extend(match ids.is_empty() {
                true => tokenizer.encode(&text, false)?,
                false => tokenizer.encode_continued(&text)?,
            });
        }
        if let Some(begin) = tokenizer.begin.filter(|begin| ids.first() != Some(begin)) {
            ids.insert(0, begin);
        }
        if ids.is_empty() {
            return Err(refusal("the chat template gives an empty prompt"));
        }
        Ok(ids)
    }

    /// A character that neither the messages nor the template have.
    fn sentinel(&self, messages: &[Message]) -> Result<char> {
        let template = self.environment.get_template(NAME).map_err(|error| failure(&error))?;
        let texts = messages.iter().map(|message| message.content.as_str());
        let texts = texts.chain([template.source()]);
        let used: HashSet<char> =
            texts.flat_map(str::chars).filter(|char| SENTINELS.contains(char)).collect();
        SENTINELS.clone().find(|char| !used.contains(char)).ok_or_else(|| {
            refusal("the messages use every private-use character from U+F0000 to U+FFFFD")
        })
    }

    /// The rendered text.
    fn text(&self, messages: Vec<Value>, flags: &[(&'static str, bool)]) -> Result<String> {
        let context = context! {
            messages,
            add_generation_prompt => true,
            bos_token => &self.begin,
            eos_token => &self.end,
            // Templates ask whether these are none.
            tools => (),
            documents => (),
            // Last, for the first of a name counts.
            ..Value::from_pairs(flags.iter().copied()),
        };
        let mut prompt = Bounded::default();
        self.environment
            .get_template(NAME)
            .and_then(|template| template.render_captured_to(context, &mut prompt).map(drop))
            .map_err(|error| match (error.kind(), error.detail()) {
                _ if prompt.full => refusal(format!(
                    "the messages give a prompt of more than {PROMPT_BYTES_MAX} bytes"
                )),
                (ErrorKind::OutOfFuel, _) => refusal(format!(
                    "the messages are more work for the model's chat template than the limit of \
                     {WORK_MAX} units allows"
                )),
                (ErrorKind::InvalidOperation, Some(detail)) => {
                    refusal(format!("the model's chat template refuses the messages: {detail}"))
                }
                _ => failure(&error),
            })?;
        String::from_utf8(prompt.bytes)
            .map_err(|_| refusal("the model's chat template gives text that is not UTF-8"))
    }
}

/// The role as templates know it.
fn role(role: &str) -> Result<&str> {
    match role {
        "system" | "user" | "assistant" | "tool" => Ok(role),
        "developer" => Ok("system"),
        _ => Err(refusal(format!(
            "role {:?} is not one of system, developer, user, assistant, tool",
            role.chars().take(32).collect::<String>()
        ))),
    }
}

fn failure(error: &minijinja::Error) -> Error {
    refusal(format!("the model's chat template fails: {error}"))
}

fn refusal(message: impl Into<String>) -> Error {
    Error::invalid("messages", message)
}

/// Takes up to the limit of a prompt.
#[derive(Default)]
struct Bounded {
    bytes: Vec<u8>,
    full: bool,
}

impl io::Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if bytes.len() > PROMPT_BYTES_MAX - self.bytes.len() {
            self.full = true;
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
