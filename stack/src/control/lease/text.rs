//! Foreign text in messages.

/// The longest foreign text that a message repeats, in characters.
const MAX_SHOWN: usize = 120;

/// Foreign text for a message: a store's values can be megabytes.
pub(super) fn shorten(text: &impl ToString) -> String {
    let text = text.to_string();
    match text.char_indices().nth(MAX_SHOWN) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}
