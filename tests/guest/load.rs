//! What a guest does all the time while something is done to its back-end.

/// Work of a guest, again and again until it is told that it is enough.
pub struct Load {
    /// Before each pass.
    begin: &'static str,
}

/// Writes to clusters that are new in each pass.
pub const NEW: Load = Load {
    begin: "blkdiscard -o 0 -l $((700 << 20)) /dev/vda",
};

/// Writes to what the disk has, or has not.
pub const OVER_OLD: Load = Load { begin: "" };

/// The random writes are new at depth 64, with flushes among them and without any, beside
/// discards, and all of them are compared. The last is told by a line on the console.
const PASSES: &str = r"
    meet_host busy
    rm -f /run/told
    (read -r _; : >/run/told) </dev/console &
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
        PASSES.replace("BEGIN", self.begin)
    }
}
