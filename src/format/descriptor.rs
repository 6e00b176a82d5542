//! `DiskDescriptor.xml`: which image files make up a disk, and how they stack.
//!
//! A [`Descriptor`] is always valid: one tree of snapshots with an image for
//! each, and file names that stay inside the bundle's folder. Whether the files
//! are there, and fit, is the business of `image`.
//!
//! Both root names are read, `Virtuozzo_disk_image` of the official tool and
//! `Parallels_disk_image` of the published format; the first is written.
//! Elements that we do not know are kept.

mod edit;
mod guid;
mod xml;

use std::collections::{HashMap, HashSet};
use std::path::{Component, Path, PathBuf};

use thiserror::Error;

pub use edit::EditError;
pub use guid::{Guid, GuidError};
pub use xml::XmlError;

use super::{ClusterSize, HEADS, SECTOR_SIZE, SECTORS_PER_TRACK, Sector, cylinders};
use xml::Element;

/// What is wrong with a descriptor.
#[derive(Debug, Error)]
pub enum DescriptorError {
    /// It is no XML.
    #[error("not well-formed: {0}")]
    Xml(#[from] XmlError),
    /// It is some other document.
    #[error("root element is '{0}', expected Virtuozzo_disk_image or Parallels_disk_image")]
    Root(String),
    /// An element is not there.
    #[error("{parent} has no {child}")]
    Missing {
        /// Which should hold it.
        parent: &'static str,
        /// Which is missing.
        child: &'static str,
    },
    /// An element is there twice that may be there once.
    #[error("{parent} has more than one {child}")]
    Repeated {
        /// Which holds it.
        parent: &'static str,
        /// Which is repeated.
        child: &'static str,
    },
    /// A number, GUID or type is none.
    #[error("{element} is '{value}', expected {expected}")]
    Value {
        /// Which one.
        element: &'static str,
        /// What it says.
        value: String,
        /// What it may say.
        expected: &'static str,
    },
    /// The disk is encrypted.
    #[error("the disk is encrypted, which is not supported")]
    Encrypted,
    /// The storage does not cover the disk from its first sector to its last.
    #[error(
        "storage covers sectors {start} to {end} of {disk_size}; split disks are not supported"
    )]
    Storage {
        /// First sector.
        start: u64,
        /// One after the last.
        end: u64,
        /// As `Disk_size` says.
        disk_size: u64,
    },
    /// A file name that may lead out of the bundle's folder.
    #[error("image file '{0}' is not a path inside the bundle's folder")]
    FileOutside(String),
    /// Two images lie in one file.
    #[error("image file '{0}' is named twice")]
    FileTwice(String),
    /// Two images or two snapshots have one GUID.
    #[error("{kind} {guid} appears twice")]
    GuidTwice {
        /// "image" or "snapshot".
        kind: &'static str,
        /// Which.
        guid: Guid,
    },
    /// A snapshot without an image, or the other way round.
    #[error("{kind} {guid} has no {other}")]
    Unpaired {
        /// "image" or "snapshot".
        kind: &'static str,
        /// Which.
        guid: Guid,
        /// What is missing.
        other: &'static str,
    },
    /// A snapshot on top of one that is not there.
    #[error("snapshot {guid} has a parent {parent} that does not exist")]
    NoParent {
        /// Which.
        guid: Guid,
        /// What it names.
        parent: Guid,
    },
    /// `TopGUID` names nothing.
    #[error("the top {0} does not exist")]
    NoTop(Guid),
    /// Snapshots depend on the image that the guest writes to.
    #[error("the top {top} has a snapshot {child} above it")]
    TopHasChild {
        /// The top.
        top: Guid,
        /// What would be spoilt by writes to it.
        child: Guid,
    },
    /// Not exactly one snapshot without a parent.
    #[error("{0} snapshots have no parent, expected one")]
    Roots(usize),
    /// Snapshots that are each other's ancestors.
    #[error("snapshot {0} is among its own ancestors")]
    Cycle(Guid),
}

/// How an image file maps the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ImageKind {
    /// `Compressed`: in the ploop format. (Nothing is compressed.)
    Expandable,
    /// `Plain`: byte for byte the disk. The base alone can be: the official tool
    /// calls every image so once the base is raw, and means the base.
    Plain,
}

/// One image file of a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    /// The snapshot whose content lies in it.
    pub guid: Guid,
    /// How.
    pub kind: ImageKind,
    /// Relative to the descriptor's folder, and inside it.
    pub file: PathBuf,
}

/// A node of the snapshot tree; the top, too, is one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shot {
    /// Its name.
    pub guid: Guid,
    /// What it lies on; `None` for the base.
    pub parent: Option<Guid>,
    /// It was deleted, but the merge of its child into it is not finished: its
    /// content means nothing by itself. (`Merging`, an element of ours; other
    /// tools take it for a snapshot.)
    pub merging: bool,
    unknown: Vec<Element>,
}

/// A checked descriptor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Descriptor {
    /// Of the guest's disk. When the top is an expandable image, its header
    /// has the last word.
    pub disk_size: Sector,
    /// Of all images.
    pub cluster: ClusterSize,
    images: Vec<Image>,
    shots: Vec<Shot>,
    top: Guid,
    unknown_in_parameters: Vec<Element>,
    unknown_in_storage: Vec<Element>,
    unknown_in_root: Vec<Element>,
}

impl Descriptor {
    /// The name of the file in a bundle's folder.
    pub const FILE_NAME: &str = "DiskDescriptor.xml";
    /// The longest chain that is made and served, base and top included; that of
    /// the official tool. Longer ones are read, so that they can be shortened.
    pub const LEVELS_MAX: usize = 127;
    /// The longest text that is worth parsing, in bytes.
    pub const TEXT_MAX: usize = 1 << 20;

    /// Of a new disk that lies in one image.
    pub fn new(disk_size: Sector, cluster: ClusterSize, kind: ImageKind, file: PathBuf) -> Self {
        Self {
            disk_size,
            cluster,
            images: vec![Image {
                guid: Guid::TOP,
                kind,
                file,
            }],
            shots: vec![Shot {
                guid: Guid::TOP,
                parent: None,
                merging: false,
                unknown: Vec::new(),
            }],
            top: Guid::TOP,
            unknown_in_parameters: Vec::new(),
            unknown_in_storage: Vec::new(),
            unknown_in_root: Vec::new(),
        }
    }

    /// Checks a text, at most [`Self::TEXT_MAX`] long.
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub fn parse(text: &str) -> Result<Self, DescriptorError> {
        let root = Element::parse(text)?;
        if root.name != "Virtuozzo_disk_image" && root.name != "Parallels_disk_image" {
            return Err(DescriptorError::Root(root.name));
        }
        let mut root = Fields::new("the root element", root.children);
        let mut parameters = root.section("Disk_Parameters")?;
        let mut storage_data = root.section("StorageData")?;
        let mut storage = storage_data.section("Storage")?;
        let snapshots = root.optional("Snapshots")?;

        let disk_size = parse_disk_size(&parameters.text("Disk_size")?)?;
        for derived in ["Cylinders", "Heads", "Sectors", "Padding"] {
            parameters.optional(derived)?;
        }
        refuse_encryption(&parameters)?;
        check_extent(&mut storage, disk_size)?;
        let cluster = parse_cluster(&storage.text("Blocksize")?)?;
        let images = storage
            .all("Image")
            .map(parse_image)
            .collect::<Result<Vec<_>, _>>()?;
        let (top, shots) = match snapshots {
            Some(snapshots) => parse_snapshots(snapshots.children)?,
            None => (Guid::TOP, shots_of_one_image(&images)?),
        };
        let mut descriptor = Self {
            disk_size,
            cluster,
            images,
            shots,
            top,
            unknown_in_parameters: parameters.rest,
            unknown_in_storage: storage.rest,
            unknown_in_root: root.rest,
        };
        descriptor.check()?;
        descriptor.expect_raw_base_only();
        Ok(descriptor)
    }

    /// What is called plain above the base is in the ploop format.
    fn expect_raw_base_only(&mut self) {
        let base = self.shots.iter().find(|shot| shot.parent.is_none());
        let base = base.map(|shot| shot.guid);
        for image in &mut self.images {
            if Some(image.guid) != base {
                image.kind = ImageKind::Expandable;
            }
        }
    }

    /// The text, with the elements in the official tool's order.
    pub fn to_xml(&self) -> String {
        let size = self.disk_size;
        let mut parameters = vec![
            Element::leaf("Disk_size", size.0),
            Element::leaf("Cylinders", cylinders(size)),
            Element::leaf("Heads", HEADS),
            Element::leaf("Sectors", SECTORS_PER_TRACK),
            Element::leaf("Padding", 0),
        ];
        parameters.extend_from_slice(&self.unknown_in_parameters);
        let mut storage = vec![
            Element::leaf("Start", 0),
            Element::leaf("End", size.0),
            Element::leaf("Blocksize", self.cluster.sectors()),
        ];
        storage.extend_from_slice(&self.unknown_in_storage);
        storage.extend(self.images.iter().map(Image::to_xml));
        let mut snapshots = vec![Element::leaf("TopGUID", self.top)];
        snapshots.extend(self.shots.iter().map(Shot::to_xml));

        let parent = Element::parent;
        let mut root = vec![
            parent("Disk_Parameters", parameters),
            parent("StorageData", vec![parent("Storage", storage)]),
            parent("Snapshots", snapshots),
        ];
        root.extend_from_slice(&self.unknown_in_root);
        let mut text = "<?xml version=\"1.0\"?>\n".to_owned();
        parent("Virtuozzo_disk_image", root).write(0, &mut text);
        text
    }

    /// The image that the guest writes to.
    pub fn top(&self) -> Guid {
        self.top
    }

    /// All image files, in the order of the text.
    pub fn images(&self) -> &[Image] {
        &self.images
    }

    /// All nodes of the snapshot tree, in the order of the text.
    pub fn shots(&self) -> &[Shot] {
        &self.shots
    }

    /// The node named `guid`.
    pub fn shot(&self, guid: Guid) -> Option<&Shot> {
        self.shots.iter().find(|shot| shot.guid == guid)
    }

    /// The image of the node named `guid`.
    pub fn image(&self, guid: Guid) -> Option<&Image> {
        self.images.iter().find(|image| image.guid == guid)
    }

    /// The nodes that lie directly on `guid`.
    pub fn children(&self, guid: Guid) -> impl Iterator<Item = &Shot> {
        let parent = Some(guid);
        self.shots.iter().filter(move |shot| shot.parent == parent)
    }

    /// The images that together are the content of node `guid`, base first;
    /// empty if there is no such node.
    pub fn chain(&self, guid: Guid) -> Vec<&Image> {
        let mut chain = Vec::new();
        let mut next = Some(guid);
        // A checked tree has no cycle and an image for each node.
        while let Some((image, shot)) = next.and_then(|g| self.image(g).zip(self.shot(g))) {
            chain.push(image);
            next = shot.parent;
        }
        chain.reverse();
        chain
    }

    fn check(&self) -> Result<(), DescriptorError> {
        self.check_names()?;
        let parents: HashMap<Guid, Option<Guid>> = self
            .shots
            .iter()
            .map(|shot| (shot.guid, shot.parent))
            .collect();
        self.check_tree(&parents)
    }

    /// Each GUID and file is there once, each image has a node and the other way round.
    fn check_names(&self) -> Result<(), DescriptorError> {
        let mut image_guids = HashSet::new();
        let mut files = HashSet::new();
        for image in &self.images {
            check_file(&image.file)?;
            if !files.insert(&image.file) {
                let name = image.file.display().to_string();
                return Err(DescriptorError::FileTwice(name));
            }
            if !image_guids.insert(image.guid) {
                let (kind, guid) = ("image", image.guid);
                return Err(DescriptorError::GuidTwice { kind, guid });
            }
        }
        let mut shot_guids = HashSet::new();
        for shot in &self.shots {
            let (kind, guid) = ("snapshot", shot.guid);
            if !shot_guids.insert(guid) {
                return Err(DescriptorError::GuidTwice { kind, guid });
            }
            if !image_guids.contains(&guid) {
                let other = "image";
                return Err(DescriptorError::Unpaired { kind, guid, other });
            }
        }
        match image_guids.difference(&shot_guids).next() {
            Some(&guid) => Err(DescriptorError::Unpaired {
                kind: "image",
                guid,
                other: "snapshot",
            }),
            None => Ok(()),
        }
    }

    fn check_tree(&self, parents: &HashMap<Guid, Option<Guid>>) -> Result<(), DescriptorError> {
        for shot in &self.shots {
            let guid = shot.guid;
            if let Some(parent) = shot.parent.filter(|parent| !parents.contains_key(parent)) {
                return Err(DescriptorError::NoParent { guid, parent });
            }
        }
        let roots = self.shots.iter().filter(|s| s.parent.is_none()).count();
        if roots != 1 {
            return Err(DescriptorError::Roots(roots));
        }
        check_for_cycles(&self.shots, parents)?;
        if !parents.contains_key(&self.top) {
            return Err(DescriptorError::NoTop(self.top));
        }
        match self.children(self.top).next() {
            Some(child) => Err(DescriptorError::TopHasChild {
                top: self.top,
                child: child.guid,
            }),
            None => Ok(()),
        }
    }
}

impl Image {
    fn to_xml(&self) -> Element {
        let kind = match self.kind {
            ImageKind::Expandable => "Compressed",
            ImageKind::Plain => "Plain",
        };
        let fields = vec![
            Element::leaf("GUID", self.guid),
            Element::leaf("Type", kind),
            Element::leaf("File", self.file.display()),
        ];
        Element::parent("Image", fields)
    }
}

impl Shot {
    fn to_xml(&self) -> Element {
        let mut fields = vec![
            Element::leaf("GUID", self.guid),
            Element::leaf("ParentGUID", self.parent.unwrap_or(Guid::NONE)),
        ];
        if self.merging {
            fields.push(Element::leaf("Merging", ""));
        }
        fields.extend_from_slice(&self.unknown);
        Element::parent("Shot", fields)
    }
}

/// The children of an element, taken out one by one; what is left is unknown.
struct Fields {
    parent: &'static str,
    rest: Vec<Element>,
}

impl Fields {
    fn new(parent: &'static str, children: Vec<Element>) -> Self {
        let rest = children;
        Self { parent, rest }
    }

    fn all(&mut self, name: &str) -> std::vec::IntoIter<Element> {
        let (taken, rest): (Vec<_>, Vec<_>) = std::mem::take(&mut self.rest)
            .into_iter()
            .partition(|child| child.name == name);
        self.rest = rest;
        taken.into_iter()
    }

    fn optional(&mut self, child: &'static str) -> Result<Option<Element>, DescriptorError> {
        let parent = self.parent;
        let mut all = self.all(child);
        match (all.next(), all.next()) {
            (_, Some(_)) => Err(DescriptorError::Repeated { parent, child }),
            (first, None) => Ok(first),
        }
    }

    fn required(&mut self, child: &'static str) -> Result<Element, DescriptorError> {
        let parent = self.parent;
        self.optional(child)?
            .ok_or(DescriptorError::Missing { parent, child })
    }

    fn section(&mut self, child: &'static str) -> Result<Self, DescriptorError> {
        Ok(Self::new(child, self.required(child)?.children))
    }

    fn text(&mut self, child: &'static str) -> Result<String, DescriptorError> {
        Ok(self.required(child)?.text)
    }
}

fn parse_number(element: &'static str, value: &str) -> Result<u64, DescriptorError> {
    value.parse().map_err(|_| DescriptorError::Value {
        element,
        value: value.to_owned(),
        expected: "a number of sectors",
    })
}

fn parse_disk_size(value: &str) -> Result<Sector, DescriptorError> {
    let sectors = parse_number("Disk_size", value)?;
    if sectors == 0 || sectors > i64::MAX as u64 / SECTOR_SIZE {
        return Err(DescriptorError::Value {
            element: "Disk_size",
            value: value.to_owned(),
            expected: "from 1 to 2^54-1 sectors",
        });
    }
    Ok(Sector(sectors))
}

fn parse_cluster(value: &str) -> Result<ClusterSize, DescriptorError> {
    parse_number("Blocksize", value)?
        .checked_mul(SECTOR_SIZE)
        .and_then(ClusterSize::from_bytes)
        .ok_or_else(|| DescriptorError::Value {
            element: "Blocksize",
            value: value.to_owned(),
            expected: "a power of two from 64 to 131072 sectors",
        })
}

fn parse_guid(element: &'static str, value: &str) -> Result<Guid, DescriptorError> {
    value.parse().map_err(|_| DescriptorError::Value {
        element,
        value: value.to_owned(),
        expected: "a GUID",
    })
}

/// Neither a key nor an engine may be named in `Disk_Parameters/Encryption`.
fn refuse_encryption(parameters: &Fields) -> Result<(), DescriptorError> {
    let is_none = |text: &str| text.is_empty() || text.parse() == Ok(Guid::NONE);
    let encrypted = parameters
        .rest
        .iter()
        .filter(|element| element.name == "Encryption")
        .any(|element| {
            !is_none(&element.text) || element.children.iter().any(|c| !is_none(&c.text))
        });
    if encrypted {
        return Err(DescriptorError::Encrypted);
    }
    Ok(())
}

fn check_extent(storage: &mut Fields, disk_size: Sector) -> Result<(), DescriptorError> {
    let start = parse_number("Start", &storage.text("Start")?)?;
    let end = parse_number("End", &storage.text("End")?)?;
    if start != 0 || end != disk_size.0 {
        return Err(DescriptorError::Storage {
            start,
            end,
            disk_size: disk_size.0,
        });
    }
    Ok(())
}

fn parse_image(element: Element) -> Result<Image, DescriptorError> {
    let mut fields = Fields::new("Image", element.children);
    let kind = fields.text("Type")?;
    let file = PathBuf::from(fields.text("File")?);
    Ok(Image {
        guid: parse_guid("GUID", &fields.text("GUID")?)?,
        kind: match kind.as_str() {
            "Compressed" => ImageKind::Expandable,
            "Plain" => ImageKind::Plain,
            _ => {
                return Err(DescriptorError::Value {
                    element: "Type",
                    value: kind,
                    expected: "Compressed or Plain",
                });
            }
        },
        file: file.strip_prefix(".").map_or(file.clone(), Path::to_owned),
    })
}

fn parse_snapshots(children: Vec<Element>) -> Result<(Guid, Vec<Shot>), DescriptorError> {
    let mut fields = Fields::new("Snapshots", children);
    let top = match fields.optional("TopGUID")? {
        Some(top) => parse_guid("TopGUID", &top.text)?,
        None => Guid::TOP,
    };
    let shots = fields
        .all("Shot")
        .map(parse_shot)
        .collect::<Result<_, _>>()?;
    Ok((top, shots))
}

fn parse_shot(element: Element) -> Result<Shot, DescriptorError> {
    let mut fields = Fields::new("Shot", element.children);
    let guid = parse_guid("GUID", &fields.text("GUID")?)?;
    let parent = parse_guid("ParentGUID", &fields.text("ParentGUID")?)?;
    Ok(Shot {
        guid,
        parent: (parent != Guid::NONE).then_some(parent),
        merging: fields.optional("Merging")?.is_some(),
        unknown: fields.rest,
    })
}

/// The tree of a descriptor that says nothing of snapshots.
fn shots_of_one_image(images: &[Image]) -> Result<Vec<Shot>, DescriptorError> {
    match images {
        [image] => Ok(vec![Shot {
            guid: image.guid,
            parent: None,
            merging: false,
            unknown: Vec::new(),
        }]),
        _ => Err(DescriptorError::Missing {
            parent: "the root element",
            child: "Snapshots",
        }),
    }
}

/// Only names of files and folders, nothing that goes up or starts anew.
fn check_file(file: &Path) -> Result<(), DescriptorError> {
    let mut names = file.components();
    let inside =
        names.clone().next().is_some() && names.all(|name| matches!(name, Component::Normal(_)));
    // A NUL would cut the name short in the kernel.
    if inside && !file.as_os_str().as_encoded_bytes().contains(&0) {
        Ok(())
    } else {
        Err(DescriptorError::FileOutside(file.display().to_string()))
    }
}

/// That every node leads to the base. Each is passed once.
fn check_for_cycles(
    shots: &[Shot],
    parents: &HashMap<Guid, Option<Guid>>,
) -> Result<(), DescriptorError> {
    let mut leads_to_base = HashSet::new();
    for shot in shots {
        let mut way = HashSet::new();
        let mut next = Some(shot.guid);
        while let Some(guid) = next.filter(|guid| !leads_to_base.contains(guid)) {
            if !way.insert(guid) {
                return Err(DescriptorError::Cycle(guid));
            }
            next = parents.get(&guid).copied().flatten();
        }
        leads_to_base.extend(way);
    }
    Ok(())
}

#[cfg(test)]
mod tests;
