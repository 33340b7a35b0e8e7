//! Requests through the router, with an engine that answers what the input says: no client's
//! mistake is a server error, and every answer is whole.
#![no_main]

use libfuzzer_sys::fuzz_target;
use sconce_fuzz::requests::{Site, check};

thread_local! {
    static SITE: Site = Site::open();
}

fuzz_target!(|data: &[u8]| SITE.with(|site| check(site, data)));
