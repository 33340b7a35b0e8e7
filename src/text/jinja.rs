//! What chat templates may call beside Jinja itself: the functions and the JSON that
//! `transformers` gives them. No loader, no environment, no file.

use std::io;
use std::time::{SystemTime, UNIX_EPOCH};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Value};
use minijinja::{Environment, Error, ErrorKind};
use serde::Serialize;
use serde_json::ser::{Formatter, PrettyFormatter, Serializer};

/// Deepest indentation of JSON.
const INDENT_MAX: usize = 8;
/// Deepest nesting of macros and loops.
const RECURSION_MAX: usize = 64;

/// An environment for one template, with `fuel` for each rendering.
///
/// # Errors
/// The template does not compile.
pub(super) fn environment(
    name: &'static str,
    source: &str,
    fuel: u64,
) -> Result<Environment<'static>, Error> {
    let mut environment = Environment::new();
    environment.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
    environment.set_fuel(Some(fuel));
    environment.set_recursion_limit(RECURSION_MAX);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.add_function("raise_exception", raise_exception);
    environment.add_function("strftime_now", strftime_now);
    environment.add_filter("tojson", to_json);
    environment.add_template_owned(name, without_generation(source))?;
    Ok(environment)
}

/// The template with `{% generation %}`, in which some wrap what a model says and which only says
/// to `transformers` what to train on, as a condition that always holds.
fn without_generation(source: &str) -> String {
    let (mut plain, mut rest) = (String::with_capacity(source.len()), source);
    while let Some((at, end)) =
        rest.find("{%").and_then(|at| Some((at, at + rest[at + 2..].find("%}")? + 4)))
    {
        let tag = &rest[at..end];
        let word = tag[2..tag.len() - 2].trim_matches(['-', '+']).trim();
        plain.push_str(&rest[..at]);
        match word {
            "generation" => plain.push_str(&tag.replace(word, "if true")),
            "endgeneration" => plain.push_str(&tag.replace(word, "endif")),
            _ => plain.push_str(tag),
        }
        rest = &rest[end..];
    }
    plain.push_str(rest);
    plain
}

/// A template's own word on what is wrong with the messages.
fn raise_exception(message: String) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, message))
}

/// JSON as Python writes it, with spaces after commas and colons and nothing escaped for HTML.
fn to_json(value: Value, options: Kwargs) -> Result<Value, Error> {
    let indent: Option<usize> = options.get("indent")?;
    let escaped: Option<bool> = options.get("ensure_ascii")?;
    options.assert_all_used()?;
    let refuse = |what: &'static str| Err(Error::new(ErrorKind::InvalidOperation, what));
    if escaped == Some(true) {
        return refuse("tojson does not escape");
    }
    let mut bytes = Vec::new();
    let written = match indent {
        Some(indent) if indent > INDENT_MAX => return refuse("tojson is indented too far"),
        Some(indent) => {
            let spaces = " ".repeat(indent);
            let pretty = PrettyFormatter::with_indent(spaces.as_bytes());
            value.serialize(&mut Serializer::with_formatter(&mut bytes, pretty))
        }
        None => value.serialize(&mut Serializer::with_formatter(&mut bytes, Spaced)),
    };
    written.map_err(|error| Error::new(ErrorKind::BadSerialization, error.to_string()))?;
    Ok(String::from_utf8_lossy(&bytes).into_owned().into())
}

/// One line, with spaces after commas and colons.
struct Spaced;

impl Formatter for Spaced {
    fn begin_array_value<W: ?Sized + io::Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + io::Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        writer.write_all(b": ")
    }
}

/// The time of day in UTC, for templates that tell the model today's date.
fn strftime_now(format: String) -> Result<String, Error> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    strftime(&format, now)
}

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const DAYS: [&str; 7] =
    ["Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday"];

/// `seconds` since 1970 in UTC, in the conversions that dates and times need.
fn strftime(format: &str, seconds: u64) -> Result<String, Error> {
    let days = seconds / 86_400;
    let (year, month, day) = date(days);
    let (hour, minute, second) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    let month_name = MONTHS[month as usize - 1];
    let day_name = DAYS[(days % 7) as usize];
    let mut text = String::new();
    let mut chars = format.chars();
    while let Some(char) = chars.next() {
        if char != '%' {
            text.push(char);
            continue;
        }
        match chars.next() {
            Some('Y') => text += &year.to_string(),
            Some('y') => text += &format!("{:02}", year % 100),
            Some('m') => text += &format!("{month:02}"),
            Some('d') => text += &format!("{day:02}"),
            Some('B') => text += month_name,
            Some('b') => text += &month_name[..3],
            Some('A') => text += day_name,
            Some('a') => text += &day_name[..3],
            Some('H') => text += &format!("{hour:02}"),
            Some('M') => text += &format!("{minute:02}"),
            Some('S') => text += &format!("{second:02}"),
            Some('%') => text.push('%'),
            other => {
                let other = other.map(String::from).unwrap_or_default();
                return Err(Error::new(
                    ErrorKind::InvalidOperation,
                    format!("strftime_now does not know %{other}"),
                ));
            }
        }
    }
    Ok(text)
}

/// Year, month and day of a day counted from 1970-01-01 (H. Hinnant, "chrono-compatible
/// low-level date algorithms", `civil_from_days`).
fn date(days: u64) -> (u64, u64, u64) {
    let days = days + 719_468;
    let era = days / 146_097;
    let of_era = days % 146_097;
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * of_year + 2) / 153;
    let day = of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    (year_of_era + era * 400 + u64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_those_of_the_calendar() {
        let at = |seconds| strftime("%A %d %B %Y %H:%M:%S|%a %b %y %m %%", seconds).unwrap();
        assert_eq!(at(0), "Thursday 01 January 1970 00:00:00|Thu Jan 70 01 %");
        assert_eq!(at(951_827_696), "Tuesday 29 February 2000 12:34:56|Tue Feb 00 02 %");
        assert_eq!(at(4_107_542_399), "Sunday 28 February 2100 23:59:59|Sun Feb 00 02 %");
        assert_eq!(at(4_107_542_400), "Monday 01 March 2100 00:00:00|Mon Mar 00 03 %");
        assert!(strftime("%Q", 0).is_err() && strftime("%", 0).is_err());
    }

    #[test]
    fn json_is_written_as_python_does() {
        let render = |source: &str| {
            let environment = environment("t", source, 100_000).unwrap();
            environment.get_template("t").unwrap().render(()).map_err(|error| error.to_string())
        };
        let value = "{'b': [1, 2.5, none, true], 'a': '<ü\"\\n>', 'c': {}}";
        assert_eq!(
            render(&format!("{{{{ {value} | tojson }}}}")).unwrap(),
            r#"{"b": [1, 2.5, null, true], "a": "<ü\"\n>", "c": {}}"#
        );
        assert_eq!(
            render("{{ [1, {'k': []}] | tojson(indent=2) }}").unwrap(),
            "[\n  1,\n  {\n    \"k\": []\n  }\n]"
        );
        assert!(render("{{ 1 | tojson(indent=1000000) }}").unwrap_err().contains("too far"));
        assert!(render("{{ 1 | tojson(ensure_ascii=true) }}").is_err());
        assert!(render("{{ 1 | tojson(surprise=1) }}").is_err());
    }
}
