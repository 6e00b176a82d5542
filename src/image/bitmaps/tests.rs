use super::*;
use crate::format::{ClusterSize, Sector};
use crate::image;

const GUID: &str = "c0c2bdc4-2c5c-4bb5-8f53-40eb0b5bb5f5";
const OTHER: &str = "00000000-2c5c-4bb5-8f53-40eb0b5bb5f5";

fn add(name: &str) -> BitmapAction {
    BitmapAction::Add {
        name: name.to_owned(),
        granularity: None,
        is_persistent: true,
        records: true,
    }
}

fn names(path: &Path) -> Vec<String> {
    let all = list_bitmaps(path, OpenMode::new(Access::Read)).unwrap();
    all.into_iter().map(|bitmap| bitmap.name).collect()
}

fn is_sound(path: &Path) -> bool {
    let report = image::check(path, None, OpenMode::new(Access::Read), &());
    report.is_ok_and(|report| report.corruptions == 0 && report.leaks == 0)
}

#[test]
fn bitmaps_are_made_merged_and_removed_where_nobody_serves_the_disk() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk");
    image::create(&path, Sector(1 << 15), ClusterSize::MIN).unwrap();
    assert_eq!(names(&path), [""; 0]);
    change_bitmaps(&path, &[add(GUID), add(OTHER)]).unwrap();
    assert_eq!(names(&path), [GUID, OTHER]);
    assert!(is_sound(&path));
    let merge = BitmapAction::Merge {
        target: OTHER.to_owned(),
        sources: vec![GUID.to_owned()],
    };
    let remove = BitmapAction::Remove(GUID.to_owned());
    // All or nothing.
    let wrong = BitmapAction::Clear("x".to_owned());
    // Nor is anything written: they would be lost meanwhile.
    let root = path.join("root.hds");
    let before = std::fs::metadata(&root).unwrap();
    let refused = change_bitmaps(&path, &[remove.clone(), wrong]).unwrap_err();
    assert_eq!(
        std::fs::metadata(&root).unwrap().modified().unwrap(),
        before.modified().unwrap()
    );
    assert!(refused.to_string().contains("'x' not found"), "{refused}");
    for action in [BitmapAction::Enable, BitmapAction::Disable] {
        let refused = change_bitmaps(&path, &[action(GUID.to_owned())]).unwrap_err();
        assert!(refused.to_string().contains("each does"), "{refused}");
    }
    assert_eq!(names(&path), [GUID, OTHER]);
    change_bitmaps(&path, &[merge, remove]).unwrap();
    assert_eq!(names(&path), [OTHER]);
    assert!(is_sound(&path));
    // A snapshot's top has none, and what is below keeps its own.
    image::create_snapshot(&path, None, None).unwrap();
    assert_eq!(names(&path), [""; 0]);
    change_bitmaps(&path, &[add(GUID)]).unwrap();
    assert_eq!(names(&path), [GUID]);
    let info = image::info(&path, OpenMode::new(Access::Read)).unwrap();
    let names = info.levels.iter().map(|level| {
        let data = &level.format_specific.as_ref().unwrap().data;
        data.bitmaps.iter().map(|it| it.name.clone()).collect()
    });
    let names: Vec<Vec<String>> = names.collect();
    assert_eq!(names, [[GUID], [OTHER]]);
}
