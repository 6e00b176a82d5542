use proptest::prelude::*;

use super::*;

/// As the official tool writes it (compared with its own files in `tests/`).
const ONE_IMAGE: &str = r#"<?xml version="1.0"?>
<Virtuozzo_disk_image>
  <Disk_Parameters>
    <Disk_size>131072</Disk_size>
    <Cylinders>256</Cylinders>
    <Heads>16</Heads>
    <Sectors>32</Sectors>
    <Padding>0</Padding>
  </Disk_Parameters>
  <StorageData>
    <Storage>
      <Start>0</Start>
      <End>131072</End>
      <Blocksize>128</Blocksize>
      <Image>
        <GUID>{5fbaabe3-6958-40ff-92a7-860e329aab41}</GUID>
        <Type>Compressed</Type>
        <File>root.hds</File>
      </Image>
    </Storage>
  </StorageData>
  <Snapshots>
    <TopGUID>{5fbaabe3-6958-40ff-92a7-860e329aab41}</TopGUID>
    <Shot>
      <GUID>{5fbaabe3-6958-40ff-92a7-860e329aab41}</GUID>
      <ParentGUID>{00000000-0000-0000-0000-000000000000}</ParentGUID>
    </Shot>
  </Snapshots>
</Virtuozzo_disk_image>
"#;

fn one_image() -> Descriptor {
    Descriptor::new(
        Sector(131_072),
        ClusterSize::from_bytes(65_536).unwrap(),
        ImageKind::Expandable,
        "root.hds".into(),
    )
}

fn guid(n: u128) -> Guid {
    format!("{n:032x}").parse().unwrap()
}

/// `levels` images in a row; the snapshots are `guid(1)`, `guid(2)` and so on.
fn chain_of(levels: usize) -> Descriptor {
    let mut descriptor = one_image();
    for n in 1..levels {
        let file = format!("root.hds.{n}").into();
        descriptor.push_top(guid(n as u128), file).unwrap();
    }
    descriptor
}

/// The error of [`ONE_IMAGE`] with one place replaced.
fn error_of(from: &str, to: &str) -> DescriptorError {
    assert!(ONE_IMAGE.contains(from), "{from}");
    Descriptor::parse(&ONE_IMAGE.replacen(from, to, 1)).unwrap_err()
}

#[test]
fn written_as_the_official_tool_does() {
    assert_eq!(one_image().to_xml(), ONE_IMAGE);
    assert_eq!(Descriptor::parse(ONE_IMAGE).unwrap(), one_image());
}

#[test]
fn the_published_format_is_read() {
    let text = ONE_IMAGE
        .replace(
            "<Virtuozzo_disk_image>",
            "<Parallels_disk_image Version=\"1.0\">",
        )
        .replace("</Virtuozzo_disk_image>", "</Parallels_disk_image>");
    assert_eq!(Descriptor::parse(&text).unwrap(), one_image());
}

#[test]
fn snapshots_may_be_left_unsaid() {
    let (start, rest) = ONE_IMAGE.split_once("  <Snapshots>").unwrap();
    let (_, end) = rest.split_once("</Snapshots>\n").unwrap();
    assert_eq!(
        Descriptor::parse(&format!("{start}{end}")).unwrap(),
        one_image()
    );
}

#[test]
fn unknown_elements_are_kept() {
    let text = ONE_IMAGE
        .replace(
            "<Padding>0</Padding>\n",
            "<Padding>0</Padding>\n    <Name a=\"&amp;\">R &amp; D</Name>\n",
        )
        .replace(
            "</Blocksize>\n",
            "</Blocksize>\n      <Preallocated>1</Preallocated>\n",
        )
        .replace(
            "</ParentGUID>\n",
            "</ParentGUID>\n      <DateTime>now</DateTime>\n",
        )
        .replace(
            "  </Snapshots>\n",
            "  </Snapshots>\n  <Other>\n    <Empty/>\n  </Other>\n",
        );
    let descriptor = Descriptor::parse(&text).unwrap();
    assert_eq!(descriptor.to_xml(), text);
    assert_ne!(descriptor, one_image());
}

#[test]
fn what_is_no_xml_is_refused() {
    for text in [
        "",
        "hello",
        "<a>",
        "<a></b>",
        "</a>",
        "<a/><b/>",
        "<a/>text",
        "<a>&lol;</a>",
        "<a>&#xFFFFFFFF;</a>",
        "<!DOCTYPE a [<!ENTITY lol \"lol\">]><a>&lol;</a>",
        &"<a>".repeat(100_000),
    ] {
        let error = Descriptor::parse(text).unwrap_err();
        assert!(
            matches!(error, DescriptorError::Xml(_)),
            "{text:.40}: {error}"
        );
    }
}

#[test]
fn each_bad_field_is_named() {
    use DescriptorError as E;
    let top = "{5fbaabe3-6958-40ff-92a7-860e329aab41}";
    let is_value = |error: E, name| matches!(error, E::Value { element, .. } if element == name);

    assert!(matches!(Descriptor::parse("<a/>"), Err(E::Root(root)) if root == "a"));
    assert!(matches!(
        error_of("Disk_Parameters>", "Disk_Params/><X>"),
        E::Xml(_)
    ));
    assert!(matches!(
        error_of("<Disk_size>131072</Disk_size>", ""),
        E::Missing {
            child: "Disk_size",
            ..
        }
    ));
    assert!(matches!(
        error_of("<Start>0</Start>", "<Start>0</Start><Start>0</Start>"),
        E::Repeated { child: "Start", .. }
    ));
    for size in [
        "0",
        "-1",
        "x",
        "",
        "18014398509481984",
        "99999999999999999999",
    ] {
        let text = format!("<Disk_size>{size}<");
        assert!(is_value(error_of("<Disk_size>131072<", &text), "Disk_size"));
    }
    for size in ["0", "1", "127", "262144", "36028797018963968"] {
        let text = format!("<Blocksize>{size}<");
        assert!(is_value(error_of("<Blocksize>128<", &text), "Blocksize"));
    }
    assert!(is_value(error_of("Compressed", "Zip"), "Type"));
    assert!(is_value(error_of(top, "top"), "GUID"));
    assert!(matches!(
        error_of("<Start>0<", "<Start>1<"),
        E::Storage { start: 1, .. }
    ));
    assert!(matches!(
        error_of("<End>131072<", "<End>131073<"),
        E::Storage { end: 131_073, .. }
    ));
    assert!(matches!(
        error_of(
            "<Padding>",
            "<Encryption><KeyId>abc</KeyId></Encryption><Padding>"
        ),
        E::Encrypted
    ));
    assert!(matches!(
        error_of(&format!("<TopGUID>{top}"), &format!("<TopGUID>{}", guid(7))),
        E::NoTop(top) if top == guid(7)
    ));
    assert!(matches!(
        error_of(&format!("<GUID>{top}"), &format!("<GUID>{}", guid(7))),
        E::Unpaired {
            kind: "snapshot",
            ..
        }
    ));
}

#[test]
fn files_outside_of_the_folder_are_refused() {
    for file in [
        "",
        ".",
        "..",
        "/root.hds",
        "../root.hds",
        "a/../../b",
        "a/..",
        "x\0y",
    ] {
        let error = error_of("root.hds", file);
        assert!(
            matches!(error, DescriptorError::FileOutside(_)),
            "{file}: {error}"
        );
    }
    let text = ONE_IMAGE.replace("root.hds", "./root.hds");
    assert_eq!(Descriptor::parse(&text).unwrap(), one_image());
    let text = ONE_IMAGE.replace("root.hds", "deltas/root.hds");
    assert!(Descriptor::parse(&text).is_ok());
}

#[test]
fn trees_that_are_none_are_refused() {
    use DescriptorError as E;
    let error = |descriptor: &Descriptor| Descriptor::parse(&descriptor.to_xml()).unwrap_err();
    let good = chain_of(3);
    assert_eq!(Descriptor::parse(&good.to_xml()).unwrap(), good);

    let mut bad = good.clone();
    bad.shots[0].parent = Some(guid(2));
    assert!(matches!(error(&bad), E::Roots(0)));
    let mut bad = good.clone();
    bad.shots[1].parent = None;
    assert!(matches!(error(&bad), E::Roots(2)));
    let mut bad = good.clone();
    bad.shots[1].parent = Some(guid(9));
    assert!(matches!(error(&bad), E::NoParent { parent, .. } if parent == guid(9)));
    let mut bad = good.clone();
    bad.shots[1].parent = Some(guid(2));
    assert!(matches!(error(&bad), E::Cycle(_)));
    let mut bad = good.clone();
    bad.shots[1].guid = guid(1);
    assert!(matches!(
        error(&bad),
        E::GuidTwice {
            kind: "snapshot",
            ..
        }
    ));
    let mut bad = good.clone();
    bad.images[1].guid = guid(1);
    assert!(matches!(error(&bad), E::GuidTwice { kind: "image", .. }));
    let mut bad = good.clone();
    bad.images[1].file = "root.hds".into();
    assert!(matches!(error(&bad), E::FileTwice(_)));
    let mut bad = good.clone();
    bad.shots.remove(1);
    assert!(matches!(error(&bad), E::Unpaired { kind: "image", .. }));
    let mut bad = good.clone();
    bad.top = guid(1);
    assert!(matches!(error(&bad), E::TopHasChild { .. }));
}

#[test]
fn a_plain_base_is_allowed() {
    let mut plain = chain_of(2);
    plain.images[0].kind = ImageKind::Plain;
    assert_eq!(Descriptor::parse(&plain.to_xml()).unwrap(), plain);
    // The official tool says so of all images then, and means the base alone.
    let mut all_plain = plain.clone();
    all_plain.images[1].kind = ImageKind::Plain;
    assert_eq!(Descriptor::parse(&all_plain.to_xml()).unwrap(), plain);
}

#[test]
fn no_chain_gets_longer_than_127_levels_but_longer_ones_are_read() {
    let mut longest = chain_of(Descriptor::LEVELS_MAX);
    assert_eq!(longest.chain(Guid::TOP).len(), 127);
    assert!(Descriptor::parse(&longest.to_xml()).is_ok());
    assert_eq!(
        longest.push_top(guid(999), "x".into()),
        Err(EditError::TooDeep)
    );
    let mut longer = longest;
    let old_top = longer.top;
    longer.rename(old_top, guid(999));
    longer.add_top(guid(999), "x".into());
    let mut read = Descriptor::parse(&longer.to_xml()).unwrap();
    assert_eq!(read, longer);
    assert_eq!(read.chain(Guid::TOP).len(), 128);
    let nameless = read.begin_collapse(guid(5)).unwrap();
    read.collapse(nameless).unwrap();
    assert_eq!(read.chain(Guid::TOP).len(), 127);
}

#[test]
fn push_names_the_old_top() {
    let descriptor = chain_of(2);
    let files: Vec<_> = descriptor
        .chain(Guid::TOP)
        .iter()
        .map(|i| &i.file)
        .collect();
    assert_eq!(files, [Path::new("root.hds"), Path::new("root.hds.1")]);
    assert_eq!(descriptor.shot(Guid::TOP).unwrap().parent, Some(guid(1)));
    let mut again = descriptor.clone();
    assert_eq!(
        again.push_top(guid(1), "x".into()),
        Err(EditError::Exists(guid(1)))
    );
    assert_eq!(
        again.push_top(Guid::TOP, "x".into()),
        Err(EditError::Exists(Guid::TOP))
    );
    assert_eq!(
        again.push_top(Guid::NONE, "x".into()),
        Err(EditError::NoneGuid)
    );
    assert_eq!(again, descriptor);
}

#[test]
fn switch_drops_the_top() {
    let mut descriptor = chain_of(3);
    assert_eq!(
        descriptor.switch_top(guid(9), "x".into()),
        Err(EditError::NotFound(guid(9)))
    );
    assert_eq!(
        descriptor.switch_top(Guid::TOP, "x".into()),
        Err(EditError::IsTop(Guid::TOP))
    );
    let dropped = descriptor.switch_top(guid(1), "new".into()).unwrap();
    assert_eq!(dropped.file, Path::new("root.hds.2"));
    assert_eq!(
        descriptor.shot(descriptor.top()).unwrap().parent,
        Some(guid(1))
    );
    assert_eq!(descriptor.children(guid(1)).count(), 2);
    // guid(2) has become a leaf, guid(1) has two children.
    assert_eq!(
        descriptor.only_child(guid(1)),
        Err(EditError::SeveralChildren {
            guid: guid(1),
            children: 2
        })
    );
    assert_eq!(
        descriptor.remove_leaf(guid(1)),
        Err(EditError::HasChildren(guid(1)))
    );
    assert_eq!(
        descriptor.remove_leaf(guid(2)).unwrap().file,
        Path::new("root.hds.1")
    );
    assert_eq!(Descriptor::parse(&descriptor.to_xml()).unwrap(), descriptor);
}

#[test]
fn collapse_keeps_the_lower_file_and_the_upper_name() {
    let mut descriptor = chain_of(3);
    let nameless = descriptor.begin_collapse(guid(1)).unwrap();
    assert!(descriptor.shot(guid(1)).is_none());
    assert!(descriptor.shot(nameless).unwrap().merging);
    assert_eq!(descriptor.begin_collapse(nameless), Ok(nameless));
    assert_eq!(Descriptor::parse(&descriptor.to_xml()).unwrap(), descriptor);

    let merged = descriptor.collapse(nameless).unwrap();
    assert_eq!(merged.file, Path::new("root.hds.1"));
    let chain = descriptor.chain(Guid::TOP);
    assert_eq!(chain.len(), 2);
    assert_eq!(
        (chain[0].guid, chain[0].file.as_path()),
        (guid(2), Path::new("root.hds"))
    );
    assert_eq!(Descriptor::parse(&descriptor.to_xml()).unwrap(), descriptor);
}

/// A change of the tree, its snapshots chosen by number.
fn edit(descriptor: &mut Descriptor, kind: u8, choice: usize, name: u128) {
    let chosen = descriptor.shots()[choice % descriptor.shots().len()].guid;
    let file = PathBuf::from(format!("file{name}"));
    // An error has to leave a valid tree, too.
    let _ = match kind {
        0 => descriptor.push_top(guid(name), file).err(),
        1 => descriptor.switch_top(chosen, file).err(),
        2 => descriptor.remove_leaf(chosen).err(),
        3 => descriptor.begin_collapse(chosen).err(),
        _ => descriptor.collapse(chosen).err(),
    };
}

proptest! {
    #[test]
    fn edits_keep_the_tree_valid(edits in prop::collection::vec((0u8..5, any::<usize>()), 1..40)) {
        let mut descriptor = one_image();
        for (name, (kind, choice)) in edits.into_iter().enumerate() {
            edit(&mut descriptor, kind, choice, name as u128 + 1);
            let parsed = Descriptor::parse(&descriptor.to_xml()).unwrap();
            prop_assert_eq!(&parsed, &descriptor);
        }
    }

    #[test]
    fn no_text_panics(
        at in 0..ONE_IMAGE.len(),
        len in 0usize..40,
        noise in prop_oneof![".{0,8}", "<[A-Za-z/]{0,8}>?", "&[a-z#0-9]{0,4};", "[{}0-9a-f-]{0,40}"],
    ) {
        let mut text = ONE_IMAGE.as_bytes().to_vec();
        text.splice(at..(at + len).min(ONE_IMAGE.len()), noise.into_bytes());
        if let Ok(descriptor) = Descriptor::parse(&String::from_utf8_lossy(&text)) {
            prop_assert_eq!(Descriptor::parse(&descriptor.to_xml()).unwrap(), descriptor);
        }
    }
}
