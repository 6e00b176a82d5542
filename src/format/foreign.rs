//! Other formats of disk images, told by how their files start.

use std::fmt;

/// A format that is neither raw nor ours. `qemu-img` reads all of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ForeignFormat {
    /// Of QEMU, versions 1 to 3.
    Qcow,
    /// Of QEMU, short-lived.
    Qed,
    /// Of VMware.
    Vmdk,
    /// Of Virtual PC; a disk of fixed size has its mark at the end, and is not told.
    Vhd,
    /// Of Hyper-V.
    Vhdx,
    /// Of VirtualBox.
    Vdi,
}

/// What the files start with.
const MAGICS: [(&[u8], ForeignFormat); 7] = [
    (b"QFI\xfb", ForeignFormat::Qcow),
    (b"QED\0", ForeignFormat::Qed),
    (b"KDMV", ForeignFormat::Vmdk),
    (b"# Disk DescriptorFile", ForeignFormat::Vmdk),
    (b"conectix", ForeignFormat::Vhd),
    (b"vhdxfile", ForeignFormat::Vhdx),
    (b"<<< ", ForeignFormat::Vdi),
];

impl ForeignFormat {
    /// The format of a file that starts with `bytes`, if it is one of these.
    pub fn of(bytes: &[u8]) -> Option<Self> {
        let known = MAGICS.iter().find(|(magic, _)| bytes.starts_with(magic));
        known.map(|(_, format)| *format)
    }

    /// What `qemu-img -f` calls it.
    pub const fn qemu_name(self) -> &'static str {
        match self {
            Self::Qcow => "qcow2",
            Self::Qed => "qed",
            Self::Vmdk => "vmdk",
            Self::Vhd => "vpc",
            Self::Vhdx => "vhdx",
            Self::Vdi => "vdi",
        }
    }
}

impl fmt::Display for ForeignFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Qcow => "qcow2",
            Self::Qed => "QED",
            Self::Vmdk => "VMDK",
            Self::Vhd => "VHD",
            Self::Vhdx => "VHDX",
            Self::Vdi => "VDI",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn told_by_the_first_bytes() {
        assert_eq!(
            ForeignFormat::of(b"QFI\xfb\0\0\0\x03"),
            Some(ForeignFormat::Qcow)
        );
        assert_eq!(ForeignFormat::of(b"QFI"), None);
        assert_eq!(ForeignFormat::of(b"WithouFreSpacExt"), None);
    }
}
