//! Incremental decoding and stop strings: pieces together are the whole text, up to the stop.
#![no_main]

use libfuzzer_sys::fuzz_target;
use sconce::text::StopStrings;
use sconce_fuzz::front::tokenizer;

fuzz_target!(|data: &[u8]| {
    let mut parts = data.splitn(2, |byte| *byte == 0);
    let stops = String::from_utf8_lossy(parts.next().unwrap_or_default());
    let stops = stops.lines().filter(|stop| !stop.is_empty()).take(4).map(str::to_owned);
    let stops: Vec<String> = stops.collect();
    let bytes = parts.next().unwrap_or_default();
    let tokenizer = tokenizer();
    let mut decode = tokenizer.stream();
    let mut pieces: Vec<String> = bytes.iter().map(|&byte| decode.push(u32::from(byte))).collect();
    pieces.push(decode.finish());
    let whole = pieces.concat();
    assert_eq!(whole, String::from_utf8_lossy(bytes), "pieces differ from the whole");

    let mut matcher = StopStrings::new(stops.clone());
    let mut shown = String::new();
    let mut found = false;
    for piece in &pieces {
        let (text, stopped) = matcher.push(piece);
        shown += &text;
        found |= stopped;
    }
    if !found {
        shown += &matcher.finish();
    }
    // The one that is complete first counts, of several the longest.
    let end = |stop: &String| whole.find(stop.as_str()).map(|at| (at + stop.len(), at));
    let first = stops.iter().filter_map(end).min();
    match first {
        Some((_, at)) => assert!(found && shown == whole[..at], "{shown:?} of {whole:?}"),
        None => assert!(!found && shown == whole, "{shown:?} of {whole:?}"),
    }
});
