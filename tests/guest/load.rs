//! What a guest does all the time while something is done to its back-end.

/// Work of a guest, again and again until it is told that it is enough.
pub struct Load {
    /// Before each pass.
    begin: &'static str,
    /// Beside all of them.
    beside: &'static str,
}

/// Writes to clusters that are new in each pass.
pub const NEW: Load = Load {
    begin: "blkdiscard -o 0 -l $((700 << 20)) /dev/vda",
    beside: "",
};

/// Writes to what the disk has, or has not.
pub const OVER_OLD: Load = Load {
    begin: "",
    beside: "",
};

/// The same, and writes to memory as [`in_memory_alone`] does.
pub const OVER_OLD_AND_IN_MEMORY: Load = Load {
    begin: "",
    beside: "work_in_memory &",
};

/// The script of a guest that has no disk, with the same meeting and end.
pub fn in_memory_alone() -> String {
    [IN_MEMORY, BEGIN, "work_in_memory"].concat()
}

/// The meeting, and the line that tells of the end.
const BEGIN: &str = r"
    meet_host busy
    rm -f /run/told
    (read -r _; : >/run/told) </dev/console &
";

/// Writes to memory at a rate that a migration keeps up with, until it is told that it is
/// enough.
const IN_MEMORY: &str = r"
    work_in_memory() {
        until [ -e /run/told ]; do
            fio --name=memory --filename=/run/work --size=16M --rw=randwrite --bs=16k \
                --rate=8M --io_size=16M --minimal </dev/null >/run/said
        done
    }
";

/// The random writes are new at depth 64, with flushes among them and without any, beside
/// discards, and all of them are compared. The last is told by a line on the console.
const PASSES: &str = r"
    BESIDE
    ask() {
        fio --filename=/dev/vda --ioengine=libaio --direct=1 --minimal $@ </dev/null
    }
    write() {
        ask --rw=randwrite --bs=16k --iodepth=64 --verify=crc32c --verify_fatal=1 \
            --randseed=$pass --size=340M $@
    }
    pass=1
    until [ -e /run/told ]; do
        BEGIN
        ask --name=trim --offset=800M --size=200M --rw=randtrim --bs=1M --iodepth=4 \
            --io_size=100M &
        trim=$!
        write --name=unflushed --offset=350M --io_size=16M &
        unflushed=$!
        write --name=flushed --io_size=16M --fdatasync=300
        wait $trim
        wait $unflushed
        pass=$((pass + 1))
    done
    # Dots, so that the trace of this line is not taken for what it looks for.
    if dmesg | grep -E 'I.O.error|is.not.a.head|blk_update|hung.task'; then exit 1; fi
    report passes $pass
    report verified yes
";

impl Load {
    /// For a guest that meets its host at `busy`, and is told the end by a line.
    pub fn script(&self) -> String {
        let passes = PASSES.replace("BESIDE", self.beside);
        [IN_MEMORY, BEGIN, &passes.replace("BEGIN", self.begin)].concat()
    }
}
