//! What clients are told unasked.

use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

use super::message;
use super::names::DISK;
use crate::format::Guid;

/// Something that has happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::control) enum Event {
    /// A front-end is being served.
    FrontEndConnected {
        /// Its process, if the kernel knows.
        pid: Option<i32>,
    },
    /// It is not any more.
    FrontEndGone,
    /// The host has no space left: writes that need some wait, or fail.
    HostFull {
        /// Whether they wait.
        waits: bool,
    },
    /// It has space again.
    HostHasSpace,
    /// A request has failed, and the guest was told.
    IoError {
        /// Whether it was a read.
        is_read: bool,
        /// Whether for want of space.
        no_space: bool,
        /// For people.
        reason: String,
    },
    /// The file of the top level is used behind the place that was asked for.
    WriteThreshold {
        /// That place, in bytes.
        threshold: u64,
        /// How many bytes behind it.
        exceeded_by: u64,
    },
    /// The lock on a file of the image is lost.
    LockLost {
        /// Its path.
        file: String,
        /// How that is known.
        reason: String,
        /// Whether requests wait.
        waits: bool,
    },
    /// After that: the image can be opened anew, and this process ends for it.
    StorageBack {
        /// The path of that file.
        file: String,
    },
    /// A snapshot was made.
    SnapshotCreated {
        /// Its name.
        guid: Guid,
    },
    /// One was deleted.
    SnapshotDeleted {
        /// The name that it had.
        guid: Guid,
    },
    /// A job has come to another status.
    JobStatusChange {
        /// Its name.
        id: String,
        /// As QMP calls it.
        status: &'static str,
    },
    /// A job is over.
    BlockJobEnded {
        /// Its name.
        id: String,
        /// As QMP calls its kind.
        kind: &'static str,
        /// Somebody has cancelled it; else it has done all, or failed.
        is_cancelled: bool,
        /// How far it has come.
        done: u64,
        /// How far it was to come.
        total: u64,
        /// Its limit in bytes a second.
        speed: u64,
        /// Why it has failed, if it has.
        error: Option<String>,
    },
    /// A file of the image cannot be reached any more by its path.
    ImageVanished {
        /// That path.
        file: String,
        /// What became of it.
        how: &'static str,
    },
}

impl Event {
    fn name(&self) -> &'static str {
        match self {
            Self::FrontEndConnected { .. } => "FRONT_END_CONNECTED",
            Self::FrontEndGone => "FRONT_END_GONE",
            Self::HostFull { .. } | Self::IoError { .. } => "BLOCK_IO_ERROR",
            Self::HostHasSpace => "HOST_HAS_SPACE",
            Self::WriteThreshold { .. } => "BLOCK_WRITE_THRESHOLD",
            Self::LockLost { .. } => "LOCK_LOST",
            Self::StorageBack { .. } => "STORAGE_BACK",
            Self::SnapshotCreated { .. } => "SNAPSHOT_CREATED",
            Self::SnapshotDeleted { .. } => "SNAPSHOT_DELETED",
            Self::JobStatusChange { .. } => "JOB_STATUS_CHANGE",
            Self::BlockJobEnded {
                is_cancelled: true, ..
            } => "BLOCK_JOB_CANCELLED",
            Self::BlockJobEnded { .. } => "BLOCK_JOB_COMPLETED",
            Self::ImageVanished { .. } => "IMAGE_VANISHED",
        }
    }

    fn data(&self) -> Value {
        match self {
            Self::FrontEndConnected { pid } => json!({ "pid": pid }),
            Self::FrontEndGone | Self::HostHasSpace => json!({}),
            Self::HostFull { waits } => {
                let action = if *waits { "stop" } else { "report" };
                let reason = "No space left on device";
                io_error(false, action, true, reason)
            }
            Self::IoError {
                is_read,
                no_space,
                reason,
            } => io_error(*is_read, "report", *no_space, reason),
            Self::WriteThreshold {
                threshold,
                exceeded_by,
            } => json!({
                "node-name": DISK,
                "amount-exceeded": exceeded_by,
                "write-threshold": threshold,
            }),
            Self::LockLost {
                file,
                reason,
                waits,
            } => json!({
                "file": file,
                "reason": reason,
                "action": if *waits { "stop" } else { "report" },
            }),
            Self::StorageBack { file } => json!({ "file": file }),
            Self::SnapshotCreated { guid } | Self::SnapshotDeleted { guid } => {
                json!({ "guid": guid.to_string() })
            }
            Self::JobStatusChange { id, status } => json!({ "id": id, "status": status }),
            Self::BlockJobEnded {
                id,
                kind,
                done,
                total,
                speed,
                error,
                ..
            } => {
                let mut data = json!({
                    "type": kind,
                    "device": id,
                    "len": total,
                    "offset": done,
                    "speed": speed,
                });
                if let Some(error) = error {
                    data["error"] = error.as_str().into();
                }
                data
            }
            Self::ImageVanished { file, how } => json!({ "file": file, "how": how }),
        }
    }

    /// As it goes out.
    pub(super) fn line(&self) -> String {
        let now = SystemTime::now();
        let now = now.duration_since(UNIX_EPOCH).unwrap_or_default();
        message::line(&json!({
            "timestamp": { "seconds": now.as_secs(), "microseconds": now.subsec_micros() },
            "event": self.name(),
            "data": self.data(),
        }))
    }
}

fn io_error(is_read: bool, action: &str, no_space: bool, reason: &str) -> Value {
    json!({
        "device": DISK,
        "node-name": DISK,
        "operation": if is_read { "read" } else { "write" },
        "action": action,
        "nospace": no_space,
        "reason": reason,
    })
}
