//! Chat templates, and conversations that are hostile to them: control tokens come from the
//! template alone.
#![no_main]

use libfuzzer_sys::fuzz_target;
use sconce::text::{ChatTemplate, Message};
use sconce_fuzz::front::{END, tokenizer};

/// Without a control token of its own.
const HONEST: &str = "{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}";

fuzz_target!(|text: &str| {
    let mut parts = text.split('\0');
    let source = parts.next().unwrap_or_default();
    let roles = ["user", "system", "assistant", "tool", "developer", "robot"];
    let message = |(turn, content): (usize, &str)| Message {
        role: roles[turn % roles.len()].to_owned(),
        content: content.to_owned(),
    };
    let messages: Vec<Message> = parts.enumerate().map(message).collect();
    let tokenizer = tokenizer();
    if let Ok(template) = ChatTemplate::new(source, "<s>", "<|end|>") {
        let _ = template.render_with(&tokenizer, &messages, &[("enable_thinking", true)]);
    }
    let honest = ChatTemplate::new(HONEST, "<s>", "<|end|>").expect("it compiles");
    if let Ok(tokens) = honest.render(&tokenizer, &messages) {
        assert!(!tokens.contains(&END), "content became a control token: {messages:?}");
    }
});
