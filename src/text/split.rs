//! How named pre-tokenizers cut a text into the pieces that merges do not cross. Knows patterns,
//! not tokens.

use std::ops::Range;

use fancy_regex::Regex;

use super::TextError;

/// A named pre-tokenizer and what goes with it.
#[derive(Debug)]
pub(super) struct Scheme {
    /// In order; each cuts the pieces that the one before left.
    cuts: &'static [Cut],
    /// A piece that is a token is taken whole, merges or not.
    pub(super) whole_first: bool,
    /// Wrapped text starts with a beginning-of-sequence token unless the file says otherwise.
    pub(super) begins: bool,
}

/// One pattern. It is the published one less its `\s+(?!\S)`: without look-ahead a search is
/// linear, and [`Split`] gives back the last space of a run itself.
#[derive(Debug, Clone, Copy)]
struct Cut {
    pattern: &'static str,
    /// A run of space before something else leaves its last character to that.
    gives_back: bool,
    /// The pattern takes line breaks with the space before them.
    breaks_lines: bool,
}

/// A pattern that gives nothing back.
const fn plain(pattern: &'static str) -> Cut {
    Cut { pattern, gives_back: false, breaks_lines: false }
}

/// A pattern that ends in `\s+`, and had `\s+(?!\S)` before.
const fn spaced(pattern: &'static str, breaks_lines: bool) -> Cut {
    Cut { pattern, gives_back: true, breaks_lines }
}

const GPT2_CUT: Cut =
    spaced(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+", false);

const THREE_DIGITS: Cut = plain("[0-9][0-9][0-9]");

const CJK: &str = "[一-龥ࠀ-一가-퟿]+";

const GPT2: Scheme = Scheme { cuts: &[GPT2_CUT], whole_first: false, begins: false };

/// Each digit stands alone.
const SMOLLM: Scheme = Scheme { cuts: &[plain(r"\p{N}"), GPT2_CUT], ..GPT2 };

const FALCON: Scheme =
    Scheme { cuts: &[plain(r"[\p{P}\$\+<=>\^~\|`]+"), GPT2_CUT, THREE_DIGITS], ..GPT2 };

/// What files without a better name were made with.
const DEFAULT: Scheme = Scheme {
    cuts: &[plain(r"[\p{P}\$\+<=>\^~\|]+"), GPT2_CUT, plain(r"\p{N}+"), THREE_DIGITS],
    ..GPT2
};

const LLAMA3: Scheme = Scheme {
    cuts: &[spaced(
        concat!(
            r"'(?:[sS]|[tT]|[rR][eE]|[vV][eE]|[mM]|[lL][lL]|[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|",
            r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"
        ),
        true,
    )],
    whole_first: true,
    begins: true,
};

const DBRX: Scheme = Scheme { whole_first: false, begins: false, ..LLAMA3 };

const GLM4: Scheme = Scheme { begins: false, ..LLAMA3 };

const QWEN2: Scheme = Scheme {
    cuts: &[spaced(
        concat!(
            r"'(?:[sS]|[tT]|[rR][eE]|[vV][eE]|[mM]|[lL][lL]|[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|",
            r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"
        ),
        true,
    )],
    ..GPT2
};

/// Marks stay with the letters before them.
const QWEN35: Scheme = Scheme {
    cuts: &[spaced(
        concat!(
            r"'(?:[sS]|[tT]|[rR][eE]|[vV][eE]|[mM]|[lL][lL]|[dD])|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|",
            r"\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"
        ),
        true,
    )],
    ..GPT2
};

const SEED_CODER: Scheme = Scheme {
    cuts: &[spaced(
        concat!(
            r"'(?:[sS]|[tT]|[rR][eE]|[vV][eE]|[mM]|[lL][lL]|[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|",
            r"\p{N}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+"
        ),
        true,
    )],
    ..GPT2
};

const TEKKEN: Scheme = Scheme {
    cuts: &[spaced(
        concat!(
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|",
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|",
            r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+"
        ),
        true,
    )],
    whole_first: true,
    begins: true,
};

const DEEPSEEK_LLM: Scheme = Scheme {
    cuts: &[
        plain(r"[\r\n]"),
        plain(r"\s?[\p{Lu}\p{Ll}\p{Lt}]+"),
        plain(r"\s?[!-/:-~！-／：-～‘-‟　-。]+"),
        plain(r"\s+\z"),
        plain(CJK),
        plain(r"\p{N}+"),
    ],
    ..GPT2
};

const DEEPSEEK_CODER: Scheme = Scheme {
    cuts: &[
        plain(r"[\r\n]"),
        plain(r"\s?\p{L}+"),
        plain(r"\s?\p{P}+"),
        plain(CJK),
        plain(r"\p{N}"),
    ],
    ..GPT2
};

const DEEPSEEK_V3: Scheme = Scheme {
    cuts: &[
        plain(r"\p{N}{1,3}"),
        plain("[一-龥぀-ゟ゠-ヿ]+"),
        spaced(
            concat!(
                r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|"##,
                r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+"
            ),
            true,
        ),
    ],
    ..GPT2
};

/// The scheme that `tokenizer.ggml.pre` names; `None` for those that nothing here was tested
/// against.
pub(super) fn scheme(pre: &str) -> Option<&'static Scheme> {
    Some(match pre {
        "default" => &DEFAULT,
        "gpt-2" | "phi-2" | "mpt" | "olmo" | "exaone4" => &GPT2,
        "smollm" | "starcoder" | "refact" | "command-r" | "codeshell" | "exaone" => &SMOLLM,
        "falcon" => &FALCON,
        "llama-bpe" | "llama3" | "llama-v3" | "falcon3" => &LLAMA3,
        "dbrx" | "smaug-bpe" | "chatglm-bpe" => &DBRX,
        "glm4" => &GLM4,
        "qwen2" | "deepseek-r1-qwen" | "stablelm2" | "megrez" | "hunyuan" => &QWEN2,
        "qwen35" => &QWEN35,
        "seed-coder" => &SEED_CODER,
        "tekken" => &TEKKEN,
        "deepseek-llm" => &DEEPSEEK_LLM,
        "deepseek-coder" => &DEEPSEEK_CODER,
        "deepseek-v3" | "hunyuan-dense" => &DEEPSEEK_V3,
        _ => return None,
    })
}

/// Cuts texts into the pieces that merges do not cross.
#[derive(Debug)]
pub(super) struct Split {
    cuts: Vec<(Regex, Cut)>,
}

impl Split {
    /// # Errors
    /// A pattern does not compile.
    pub(super) fn new(scheme: &Scheme) -> Result<Self, TextError> {
        let compiled = |cut: &Cut| {
            let pattern = Regex::new(cut.pattern).map_err(|error| {
                TextError(format!("the split pattern does not compile: {error}"))
            })?;
            Ok((pattern, *cut))
        };
        Ok(Self { cuts: scheme.cuts.iter().map(compiled).collect::<Result<_, TextError>>()? })
    }

    /// Gives the pieces of `text` to `each`, in order.
    pub(super) fn pieces(&self, text: &str, each: &mut dyn FnMut(&str)) {
        split(&self.cuts, text, each);
    }
}

/// Cuts by the first pattern, and what it leaves by the others.
fn split(cuts: &[(Regex, Cut)], text: &str, each: &mut dyn FnMut(&str)) {
    let Some(((pattern, cut), rest)) = cuts.split_first() else { return each(text) };
    let mut done = 0;
    // Patterns have no look-around and match no empty text, so the search is linear and cannot
    // fail.
    while let Ok(Some(found)) = pattern.find_from_pos(text, done) {
        let Range { start, mut end } = found.range();
        if start > done {
            split(rest, &text[done..start], each);
        }
        if cut.gives_back {
            end = start + give_back(*cut, &text[start..], end - start);
        }
        split(rest, &text[start..end], each);
        done = end;
    }
    if done < text.len() {
        split(rest, &text[done..], each);
    }
}

/// The length of the first piece of `text` of which the pattern took `length` bytes: a run of
/// space before something else leaves its last character to that.
fn give_back(cut: Cut, text: &str, length: usize) -> usize {
    let piece = &text[..length];
    let kept_whole = length == text.len()
        || (cut.breaks_lines && piece.ends_with(['\r', '\n']))
        || !piece.chars().all(char::is_whitespace);
    match piece.char_indices().next_back() {
        Some((last, _)) if last > 0 && !kept_whole => last,
        _ => length,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pieces(pre: &str, text: &str) -> Vec<String> {
        let split = Split::new(scheme(pre).unwrap()).unwrap();
        let mut pieces = Vec::new();
        split.pieces(text, &mut |piece| pieces.push(piece.to_owned()));
        pieces
    }

    #[test]
    fn cuts_apply_one_after_the_other() {
        assert_eq!(pieces("falcon", "a, 12345 b"), ["a", ",", " ", "123", "45", " b"]);
        assert_eq!(pieces("falcon", "x12345"), ["x", "123", "45"]);
        assert_eq!(pieces("smollm", "ab  12"), ["ab", "  ", "1", "2"]);
        assert_eq!(pieces("deepseek-v3", "a 12345"), ["a", " ", "123", "45"]);
        assert_eq!(pieces("qwen35", "cafe\u{301}s"), ["cafe\u{301}s"]);
        assert_eq!(pieces("qwen2", "cafe\u{301}s"), ["cafe", "\u{301}s"]);
        assert_eq!(pieces("tekken", "HelloWorld"), ["Hello", "World"]);
        assert_eq!(pieces("deepseek-llm", "a   "), ["a", "   "]);
    }

    #[test]
    fn every_known_name_compiles_and_loses_nothing() {
        let text = "It's 12345 naïve  tests\n\n  of\tΩ-words, 東京 & (more)   ";
        for pre in ["default", "gpt-2", "smollm", "falcon", "llama-bpe", "dbrx", "glm4", "qwen2"] {
            assert_eq!(pieces(pre, text).concat(), text, "{pre}");
        }
        for pre in ["qwen35", "seed-coder", "tekken", "deepseek-llm", "deepseek-coder"] {
            assert_eq!(pieces(pre, text).concat(), text, "{pre}");
        }
        assert!(scheme("gpt-5-imagined").is_none());
    }
}
