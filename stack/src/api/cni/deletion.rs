//! Attachments that ended while no node was there: a plugin leaves a file for each, and the node
//! ends them when it starts.

use super::Key;

/// The directory of those files, beside the control socket.
pub const DIRECTORY: &str = "deletions";
/// Bytes of the longest such file.
pub const MAX_LEN: usize = 8 << 10;

/// The name of an attachment's file: of the hash of its key, since what runtimes call a container
/// need not fit a name. Both ends make it, which may be of different versions.
#[must_use]
pub fn file_name(key: &Key) -> String {
    let parts = [&key.network, &key.container, &key.interface];
    // No part has a zero byte, so that different keys are different here.
    let bytes = parts.iter().flat_map(|part| part.bytes().chain([0]));
    // FNV-1a of 128 bits (draft-eastlake-fnv).
    let hash = bytes.fold(0x6c62_272e_07bb_0142_62b8_2175_6295_c58d, |hash, byte| {
        (hash ^ u128::from(byte)).wrapping_mul(0x0000_0000_0100_0000_0000_0000_0000_013b)
    });
    format!("{hash:032x}.json")
}

/// What is in an attachment's file.
#[must_use]
pub fn print(key: &Key) -> String {
    serde_json::json!(key).to_string()
}

/// The attachment whose file this is; nothing if it is damaged.
#[must_use]
pub fn read(bytes: &[u8]) -> Option<Key> {
    let is_short = bytes.len() <= MAX_LEN;
    is_short.then(|| serde_json::from_slice(bytes).ok())?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_one_end_writes_the_other_reads() {
        let one = Key::new("muslin", "c1", "eth0");
        // Must never change.
        assert_eq!(file_name(&one), "3bbe4898a32410d97dd73e9df9b2bba6.json");
        assert_eq!(read(print(&one).as_bytes()), Some(one.clone()));
        assert_ne!(
            file_name(&one),
            file_name(&Key::new("muslin", "c1e", "th0"))
        );
        for damaged in [&b""[..], b"{", b"{}", &[b' '; MAX_LEN + 1]] {
            assert_eq!(read(damaged), None);
        }
    }
}
