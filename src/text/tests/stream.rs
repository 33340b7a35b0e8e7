//! Decoding token by token, and stop strings, against their definitions.

use super::*;

#[test]
fn what_is_streamed_is_what_is_decoded() {
    let tokenizer = tokenizer("gpt-2");
    let mut random = Random(11);
    for _ in 0..2_000 {
        // Random bytes, biased towards parts of long characters.
        let ids: Vec<TokenId> = (0..random.below(12))
            .map(|_| match random.below(4) {
                0 => random.below(270) as u32,
                1 => random.pick(&[0xf0, 0xe2, 0xc3, 0xed, 0xf4]),
                2 => 0x80 + random.below(64) as u32,
                _ => u32::from(b'a'),
            })
            .collect();
        let mut stream = tokenizer.stream();
        let mut text = String::new();
        for id in &ids {
            text += &stream.push(*id);
            assert!(stream.pending.len() < 4, "holds back at most a part of a character");
        }
        text += &stream.finish();
        assert_eq!(text, tokenizer.decode(&ids), "{ids:?}");
        assert_eq!(stream.finish(), "");
    }
}

#[test]
fn characters_appear_when_they_are_whole() {
    let tokenizer = tokenizer("gpt-2");
    let mut stream = tokenizer.stream();
    let mut push = |id: u32| stream.push(id);
    assert_eq!([0xf0, 0x9f, 0x95].map(&mut push), ["", "", ""]);
    assert_eq!(push(0xaf), "🕯");
    assert_eq!(push(0xe2), "");
    assert_eq!(push(264), "", "a control token adds nothing");
    assert_eq!(push(0x41), "\u{fffd}A", "no longer a character");
    assert_eq!(push(0xff), "\u{fffd}");
    assert_eq!(push(0xc3), "");
    assert_eq!(stream.finish(), "\u{fffd}");
}

fn stops(strings: &[&str]) -> StopStrings {
    StopStrings::new(strings.iter().map(|text| (*text).to_owned()).collect())
}

/// The text before the stop string that is complete first, of several the longest.
fn expected(text: &str, strings: &[&str]) -> (String, bool) {
    for end in 1..=text.len() {
        let ending =
            strings.iter().filter(|stop| text.as_bytes()[..end].ends_with(stop.as_bytes()));
        if let Some(longest) = ending.map(|stop| stop.len()).max() {
            return (text[..end - longest].to_owned(), true);
        }
    }
    (text.to_owned(), false)
}

/// Every piece's text, checked to hold back no more than the start of a stop string.
fn run(pieces: &[&str], strings: &[&str]) -> (String, bool) {
    let mut stops = stops(strings);
    let (mut shown, mut given) = (String::new(), String::new());
    for piece in pieces {
        given += piece;
        let (text, found) = stops.push(piece);
        shown += &text;
        if found {
            assert_eq!(stops.push("more"), (String::new(), true));
            return (shown + &stops.finish(), true);
        }
        let held = &given[shown.len()..];
        let starts = |stop: &&str| stop.len() > held.len() && stop.starts_with(held);
        assert!(held.is_empty() || strings.iter().any(starts), "{held:?} of {given:?}");
    }
    (shown + &stops.finish(), false)
}

#[test]
fn a_stop_string_is_found_however_the_text_is_cut() {
    let cases: [(&str, &[&str]); 9] = [
        ("one two three", &["two"]),
        ("aaaaab", &["aab"]),
        ("abababac", &["ababac", "bac"]),
        ("abc", &["b", "abc"]),
        ("xabcd", &["abcd", "bcd", "cd"]),
        ("no stop here", &["stops", "here!"]),
        ("naïve 🕯 wick", &["🕯"]),
        ("\n\nUser: ", &["\nUser:", "\n\nHuman:"]),
        ("anything", &[]),
    ];
    for (text, strings) in cases {
        let expected = expected(text, strings);
        assert_eq!(run(&[text], strings), expected);
        for (first, _) in text.char_indices() {
            for (second, _) in text[first..].char_indices() {
                let (a, rest) = text.split_at(first);
                let (b, c) = rest.split_at(second);
                assert_eq!(run(&[a, b, c], strings), expected, "{a:?} {b:?} {c:?}");
            }
        }
        let mut buffer = [0; 4];
        let mut chars = stops(strings);
        let mut shown = String::new();
        for char in text.chars() {
            shown += &chars.push(char.encode_utf8(&mut buffer)).0;
        }
        assert_eq!(shown + &chars.finish(), expected.0);
    }
}

#[test]
fn random_texts_stop_where_the_definition_says() {
    let mut random = Random(3);
    for _ in 0..5_000 {
        let mut word = |limit| -> String {
            (0..1 + random.below(limit)).map(|_| random.pick(&['a', 'b', 'é'])).collect()
        };
        let text = word(24);
        let strings = [word(5), word(4), word(3)];
        let strings: Vec<&str> = strings.iter().map(String::as_str).collect();
        let mut pieces = Vec::new();
        let mut rest = text.as_str();
        while !rest.is_empty() {
            let chars = 1 + random.below(4);
            let end = rest.char_indices().nth(chars).map_or(rest.len(), |(at, _)| at);
            pieces.push(&rest[..end]);
            rest = &rest[end..];
        }
        assert_eq!(run(&pieces, &strings), expected(&text, &strings), "{pieces:?} {strings:?}");
    }
}

#[test]
fn empty_stop_strings_are_passed_over() {
    assert_eq!(stops(&["", ""]).push("text"), ("text".to_owned(), false));
}
