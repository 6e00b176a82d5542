//! DiskDescriptor.xml and snapshots.json.
#![no_main]

use std::path::Component;

use libfuzzer_sys::fuzz_target;
use vhost_user_ploop::format::{Descriptor, Guid, SnapshotNotes};

fuzz_target!(|text: &str| {
    if let Ok(notes) = SnapshotNotes::parse(text) {
        let again = SnapshotNotes::parse(&notes.to_json()).expect("notes of ours can be read");
        assert_eq!(again.to_json(), notes.to_json());
    }
    let Ok(descriptor) = Descriptor::parse(text) else {
        return;
    };
    for image in descriptor.images() {
        let mut parts = image.file.components();
        let is_inside = parts.all(|part| matches!(part, Component::Normal(_) | Component::CurDir));
        assert!(is_inside, "{:?} leaves the folder", image.file);
    }
    for shot in descriptor.shots() {
        assert!(!descriptor.chain(shot.guid).is_empty());
        descriptor.children(shot.guid).count();
    }
    assert!(descriptor.image(descriptor.top()).is_some());
    let written = descriptor.to_xml();
    let again = Descriptor::parse(&written).expect("a descriptor of ours can be read");
    assert_eq!(again.to_xml(), written);
    assert_eq!(again.images(), descriptor.images());
    edit(descriptor);
});

/// Whatever can be done to it, what comes out is a descriptor.
fn edit(descriptor: Descriptor) {
    let new = Guid::random();
    let guids: Vec<_> = descriptor.shots().iter().map(|shot| shot.guid).collect();
    let mut edited = Vec::new();
    let mut pushed = descriptor.clone();
    if pushed.push_top(new, "new.hds".into()).is_ok() {
        edited.push(pushed);
    }
    for guid in guids.into_iter().take(4) {
        let mut other = descriptor.clone();
        if other.switch_top(guid, "new.hds".into()).is_ok() {
            edited.push(other);
        }
        let mut other = descriptor.clone();
        if other.remove_leaf(guid).is_ok() {
            edited.push(other);
        }
        let mut other = descriptor.clone();
        if other.begin_collapse(guid).is_ok() {
            edited.push(other.clone());
        }
        let mut other = descriptor.clone();
        if other.collapse(guid).is_ok() {
            edited.push(other);
        }
    }
    for edited in edited {
        let text = edited.to_xml();
        let read = Descriptor::parse(&text).expect("what was edited can be read");
        assert_eq!(read.to_xml(), text);
    }
}
