//! A TOML text with the line of each thing in it, so that an error can point at it. Knows no keys.

use std::ops::Range;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

/// One `section.name = value` of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Entry {
    /// `section.name`, or just `name` outside any section.
    pub(super) key: String,
    /// The value as text, the items of a list one a line; none for a table or a list of these.
    pub(super) text: Option<String>,
    /// Counted from 1.
    pub(super) line: usize,
}

/// A step from a table or a list to something in it.
#[derive(Debug, Clone, Copy)]
pub(super) enum Step {
    /// By key.
    Key(&'static str),
    /// By position.
    Item(usize),
}

/// Parses and lists every entry, two levels deep.
///
/// # Errors
/// The line and what is wrong there.
pub(super) fn entries(text: &str) -> Result<Vec<Entry>, (usize, String)> {
    let table = DeTable::parse(text).map_err(|error| fault(text, &error))?;
    let mut entries = Vec::new();
    for (section, value) in table.get_ref() {
        match value.get_ref() {
            DeValue::Table(inner) => {
                for (name, value) in inner {
                    let key = format!("{}.{}", section.get_ref(), name.get_ref());
                    entries.push(entry(text, key, &name.span(), value));
                }
            }
            _ => entries.push(entry(text, section.get_ref().to_string(), &section.span(), value)),
        }
    }
    Ok(entries)
}

/// The line of what `path` leads to; of the nearest thing on the way if it is not there.
pub(super) fn line_at(text: &str, path: &[Step]) -> usize {
    let Ok(table) = DeTable::parse(text) else { return 1 };
    let mut line = 1;
    let root = Spanned::new(table.span(), DeValue::Table(table.into_inner()));
    let mut here = &root;
    for step in path {
        let next = match step {
            Step::Key(key) => here.get_ref().get(*key),
            Step::Item(index) => here.get_ref().get(*index),
        };
        let Some(next) = next else { break };
        line = line_of(text, &next.span());
        here = next;
    }
    line
}

/// The line and the text of a parser's error.
pub(super) fn fault(text: &str, error: &toml::de::Error) -> (usize, String) {
    let line = error.span().map_or(1, |span| line_of(text, &span));
    (line, error.message().to_owned())
}

fn entry(text: &str, key: String, span: &Range<usize>, value: &Spanned<DeValue<'_>>) -> Entry {
    Entry { key, text: plain(value.get_ref()), line: line_of(text, span) }
}

fn plain(value: &DeValue<'_>) -> Option<String> {
    match value {
        DeValue::String(text) => Some(text.to_string()),
        DeValue::Integer(number) if number.radix() == 10 => Some(number.as_str().to_owned()),
        DeValue::Integer(number) => {
            i64::from_str_radix(number.as_str(), number.radix()).ok().map(|n| n.to_string())
        }
        DeValue::Float(number) => Some(number.as_str().to_owned()),
        DeValue::Boolean(value) => Some(value.to_string()),
        DeValue::Datetime(value) => Some(value.to_string()),
        DeValue::Array(items) => {
            let items = items.iter().map(|item| plain(item.get_ref())).collect::<Option<Vec<_>>>();
            items.map(|items| items.join("\n"))
        }
        DeValue::Table(_) => None,
    }
}

fn line_of(text: &str, span: &Range<usize>) -> usize {
    text.as_bytes()[..span.start.min(text.len())].iter().filter(|byte| **byte == b'\n').count() + 1
}
