//! See the library's `segments` module for what is checked.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| muslin_fuzz::segments::run(data));
