//! Stop strings in a text that comes in pieces. Knows no tokens: what is found does not depend on
//! how the text is cut.

use super::StopStrings;

/// One stop string and how much of it the text so far ends with (Knuth, Morris, Pratt 1977).
#[derive(Debug)]
pub(super) struct Pattern {
    bytes: Vec<u8>,
    /// For each length, the longest shorter one that is both a prefix and a suffix of it.
    shorter: Vec<usize>,
    matched: usize,
}

impl Pattern {
    fn new(text: String) -> Self {
        let bytes = text.into_bytes();
        let mut pattern = Self { shorter: vec![0; bytes.len()], bytes, matched: 0 };
        for end in 1..pattern.bytes.len() {
            let byte = pattern.bytes[end];
            pattern.step(byte);
            pattern.shorter[end] = pattern.matched;
        }
        pattern.matched = 0;
        pattern
    }

    /// Takes in one byte; whether it completes the string.
    fn step(&mut self, byte: u8) -> bool {
        while self.matched > 0 && self.bytes[self.matched] != byte {
            self.matched = self.shorter[self.matched - 1];
        }
        if self.bytes[self.matched] == byte {
            self.matched += 1;
        }
        self.matched == self.bytes.len()
    }
}

impl StopStrings {
    /// None of `strings` is empty; an empty one is passed over.
    pub fn new(strings: Vec<String>) -> Self {
        let strings = strings.into_iter().filter(|text| !text.is_empty());
        let patterns = strings.map(Pattern::new).collect();
        Self { patterns, held: String::new(), found: false }
    }

    /// Text that can be shown now, and whether a stop string was found (what follows it, and the
    /// string itself, are dropped). The one that is complete first counts, of several the
    /// longest. Once found, everything is dropped.
    pub fn push(&mut self, text: &str) -> (String, bool) {
        if self.found {
            return (String::new(), true);
        }
        let before = self.held.len();
        self.held.push_str(text);
        for (index, byte) in text.bytes().enumerate() {
            let mut longest = 0;
            for pattern in &mut self.patterns {
                if pattern.step(byte) {
                    longest = longest.max(pattern.bytes.len());
                }
            }
            if longest > 0 {
                self.found = true;
                let mut shown = std::mem::take(&mut self.held);
                shown.truncate(before + index + 1 - longest);
                return (shown, true);
            }
        }
        // A string starts with a whole character, so the cut is at a character's border.
        let kept = self.patterns.iter().map(|pattern| pattern.matched).max().unwrap_or(0);
        let held = self.held.split_off(self.held.len() - kept);
        (std::mem::replace(&mut self.held, held), false)
    }

    /// What was held back, at the end.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}
