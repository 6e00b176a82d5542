//! Sockets as the kernel lists them.
//!
//! The file of a socket is there a moment before anybody listens, and who connects in between is
//! refused. To connect only to find out is no way: for many a server that is its client.

use std::fs;
use std::path::Path;

/// Whether connections to a socket that was made at this path are accepted.
pub fn is_listened_on(socket: &Path) -> bool {
    socket.exists() && is_any_listened_on(|path| path == socket)
}

/// The same of one that was made under another name, through a descriptor of its folder, and moved
/// into its place when it listened. Any such socket will do.
pub fn is_listened_on_as_moved(socket: &Path) -> bool {
    socket.exists() && is_any_listened_on(|path| path.starts_with("/proc/self/fd"))
}

fn is_any_listened_on(is_it: impl Fn(&Path) -> bool) -> bool {
    /// `__SO_ACCEPTCON`, as the kernel prints it.
    const LISTENS: &str = "00010000";
    let sockets = fs::read_to_string("/proc/net/unix").expect("the kernel lists its sockets");
    sockets.lines().any(|line| {
        let fields: Vec<_> = line.split_ascii_whitespace().collect();
        let path = fields.get(7).map(Path::new);
        fields.get(3) == Some(&LISTENS) && path.is_some_and(&is_it)
    })
}
