//! A generator's text from the files that Hugging Face models come with: `tokenizer.json`, and
//! beside it the chat template, the names of special tokens and the tokens that end an answer.
//! Knows keys of files, not where they lie.

use std::sync::Arc;

use serde_json::Value as Json;
use tokenizers::{DecoderWrapper, PreTokenizerWrapper, pre_tokenizers::metaspace::PrependScheme};

use super::{ChatTemplate, ModelText, STOP_NAMES, TextError, Tokenizer};
use crate::request::TokenId;

/// The content of a model's files.
#[derive(Debug, Clone, Default)]
pub struct HfFiles {
    /// `tokenizer.json`.
    pub tokenizer: Vec<u8>,
    /// `tokenizer_config.json`: special tokens by role, and usually the chat template.
    pub tokenizer_config: Option<Json>,
    /// `chat_template.jinja`; goes before the one in `tokenizer_config.json`.
    pub chat_template: Option<String>,
    /// `generation_config.json`: the tokens that end an answer.
    pub generation_config: Option<Json>,
    /// `config.json`: the same, in older models.
    pub config: Option<Json>,
}

impl ModelText {
    /// A generator's text. A model without a template serves completions only.
    ///
    /// # Errors
    /// The tokenizer or the template cannot be used, or a file contradicts another.
    pub fn from_hf_generator(files: &HfFiles) -> Result<Self, TextError> {
        let tokenizer = Tokenizer::from_hf_json(&files.tokenizer)?;
        let text_of = |key: &str| {
            let token = files.tokenizer_config.as_ref().and_then(|config| config.get(key));
            let content = token.and_then(|token| token.get("content")).or(token);
            content.and_then(Json::as_str).unwrap_or_default()
        };
        let in_config =
            files.tokenizer_config.as_ref().and_then(|config| config.get("chat_template"));
        let template = match (files.chat_template.as_deref(), in_config) {
            (Some(source), _) => Some(source),
            (None, None | Some(Json::Null)) => None,
            (None, Some(given)) => Some(named_template(given)?),
        };
        let template = template
            .map(|source| ChatTemplate::new(source, text_of("bos_token"), text_of("eos_token")))
            .transpose()?;

        let mut stops = Vec::new();
        let configs =
            [("generation_config.json", &files.generation_config), ("config.json", &files.config)];
        for (file, config) in configs {
            let ids = config.as_ref().and_then(|config| config.get("eos_token_id"));
            stops.extend(stop_ids(file, ids.unwrap_or(&Json::Null), tokenizer.vocab_size())?);
        }
        stops.extend(tokenizer.control(text_of("eos_token")));
        stops.extend(STOP_NAMES.iter().filter_map(|name| tokenizer.control(name)));
        stops.sort_unstable();
        stops.dedup();
        Ok(Self {
            tokenizer: Arc::new(tokenizer),
            template: template.map(Arc::new),
            stop_tokens: stops.into(),
        })
    }
}

/// The template that a configuration gives: alone, or as the default one of a list.
fn named_template(given: &Json) -> Result<&str, TextError> {
    let unusable = || TextError("tokenizer_config.json: 'chat_template' is unusable".to_owned());
    if let Some(source) = given.as_str() {
        return Ok(source);
    }
    let list = given.as_array().ok_or_else(unusable)?;
    let default = list.iter().find(|one| one.get("name").is_some_and(|name| name == "default"));
    default.and_then(|one| one.get("template")).and_then(Json::as_str).ok_or_else(unusable)
}

/// One token or a list of them.
fn stop_ids(file: &str, given: &Json, vocabulary: usize) -> Result<Vec<TokenId>, TextError> {
    let ids = match given {
        Json::Null => return Ok(Vec::new()),
        Json::Array(ids) => ids.as_slice(),
        one => std::slice::from_ref(one),
    };
    let id = |value: &Json| {
        let id = value.as_u64().filter(|id| *id < vocabulary as u64);
        id.map(|id| id as TokenId).ok_or_else(|| {
            TextError(format!("{file}: eos_token_id {value}; there are {vocabulary} tokens"))
        })
    };
    ids.iter().map(id).collect()
}

/// How the tokens of a `tokenizer.json` are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Spelling {
    /// As the text that they stand for.
    Plain,
    /// Each byte as a character.
    ByteLevel,
    /// U+2581 for a space, and perhaps `<0x..>` for bytes.
    Sentence {
        /// Whether `<0x..>` is a byte.
        bytes: bool,
        /// Whether a text gets a space in front, which decoding takes off.
        space_before: bool,
    },
}

impl Spelling {
    /// What the decoder of `hf` undoes.
    pub(super) fn of(hf: &tokenizers::Tokenizer) -> Self {
        let mut steps = Vec::new();
        match hf.get_decoder() {
            Some(DecoderWrapper::Sequence(sequence)) => steps.extend(sequence.get_decoders()),
            one => steps.extend(one),
        }
        let has = |wanted: fn(&DecoderWrapper) -> bool| steps.iter().any(|step| wanted(step));
        if has(|step| matches!(step, DecoderWrapper::ByteLevel(_))) {
            return Self::ByteLevel;
        }
        let bytes = has(|step| matches!(step, DecoderWrapper::ByteFallback(_)));
        let strips = has(|step| matches!(step, DecoderWrapper::Strip(_)));
        let spaces = steps.iter().find_map(|step| match step {
            DecoderWrapper::Metaspace(space) => {
                Some(space.get_prepend_scheme() != PrependScheme::Never)
            }
            _ => None,
        });
        match spaces {
            None if !bytes => Self::Plain,
            spaces => Self::Sentence { bytes, space_before: strips || spaces == Some(true) },
        }
    }

    /// The bytes of a token that is written `text`.
    pub(super) fn sentence_bytes(text: &str, bytes: bool) -> Vec<u8> {
        if bytes && let Some(byte) = written_byte(text) {
            return vec![byte];
        }
        text.replace(super::spm::SPACE, " ").into_bytes()
    }
}

/// The byte of `<0x0A>` and the like.
pub(super) fn written_byte(text: &str) -> Option<u8> {
    let digits = text.strip_prefix("<0x")?.strip_suffix('>')?;
    let hex = digits.len() == 2 && digits.bytes().all(|digit| digit.is_ascii_hexdigit());
    hex.then(|| u8::from_str_radix(digits, 16).ok()).flatten()
}

/// A copy of `hf` for texts that go on after a control token, where that makes a difference:
/// where a space is put only before the first piece of a text.
pub(super) fn continuing(hf: &tokenizers::Tokenizer) -> Option<Box<tokenizers::Tokenizer>> {
    let mut copy = hf.clone();
    let mut changed = false;
    let mut change = |step: &mut PreTokenizerWrapper| {
        if let PreTokenizerWrapper::Metaspace(space) = step
            && space.get_prepend_scheme() == PrependScheme::First
        {
            space.set_prepend_scheme(PrependScheme::Never);
            changed = true;
        }
    };
    let mut splitter = copy.get_pre_tokenizer()?.clone();
    match &mut splitter {
        PreTokenizerWrapper::Sequence(sequence) => sequence.as_mut().iter_mut().for_each(change),
        one => change(one),
    }
    copy.with_pre_tokenizer(Some(splitter));
    changed.then(|| Box::new(copy))
}
