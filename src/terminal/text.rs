//! Text that others wrote, as people may see it.
//!
//! Keys and values of a store, names, and what a server says are printed and logged. A terminal does
//! what control characters say, and readers of a log take a line for a line of ours.

use std::borrow::Cow;

/// The text in one line, with escapes for what a terminal would not print, or print elsewhere.
pub(crate) fn plain(text: &str) -> Cow<'_, str> {
    if !text.contains(is_hidden) {
        return Cow::Borrowed(text);
    }
    let mut plain = String::with_capacity(text.len());
    for symbol in text.chars() {
        if is_hidden(symbol) {
            plain.extend(symbol.escape_default());
        } else {
            plain.push(symbol);
        }
    }
    Cow::Owned(plain)
}

/// Control characters, and those that end lines or turn the direction of writing.
fn is_hidden(symbol: char) -> bool {
    symbol.is_control()
        || matches!(
            symbol,
            '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}'
        )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_terminal_would_obey_is_escaped() {
        for (text, expected) in [
            ("vxlan", "vxlan"),
            ("größe \"x\" 日本 \\", "größe \"x\" 日本 \\"),
            ("\x1b[2J\x1b]0;owned\x07", "\\u{1b}[2J\\u{1b}]0;owned\\u{7}"),
            ("a\r\nlevel=INFO b", "a\\r\\nlevel=INFO b"),
            ("\u{9b}31m\u{7f}", "\\u{9b}31m\\u{7f}"),
            (
                "a\u{202e}b\u{2066}c\u{2028}d",
                "a\\u{202e}b\\u{2066}c\\u{2028}d",
            ),
        ] {
            assert_eq!(plain(text), expected);
        }
    }
}
