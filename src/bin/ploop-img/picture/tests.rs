//! Pictures, without looking at them.

use std::io::Cursor;

use quick_xml::Reader;
use quick_xml::events::Event;

use super::*;

const MIB: u64 = 1 << 20;

/// With a header, so many clusters, the last of which begin pieces, and one that is not used.
fn level(name: &str, clusters: u64, pieces: u64) -> LevelLayout {
    let stretch = |metadata, begun, following| Stretch {
        metadata,
        begun,
        following,
    };
    let unused = Stretch::default();
    let mut stretches = vec![stretch(MIB, 0, 0)];
    stretches.resize(1 + (clusters - pieces) as usize, stretch(0, 0, MIB));
    stretches.resize(1 + clusters as usize, stretch(0, MIB, 0));
    stretches.push(unused);
    LevelLayout {
        filename: name.into(),
        is_raw: false,
        length: (clusters + 2) * MIB,
        held: clusters * MIB,
        seen: 0,
        clusters,
        pieces,
        stretches,
    }
}

/// 8 MiB: of the first part, half is read from either level; of the second, all from the
/// lower one; of the last, a little from the top.
pub fn two_levels() -> Layout {
    let part = |held: &[(usize, u64)]| Part {
        held: held.to_vec(),
    };
    let mut levels = vec![level("top & <more>", 4, 2), level("base", 4, 1)];
    (levels[0].seen, levels[1].seen) = (MIB + MIB / 8, 3 * MIB);
    Layout {
        disk_size: 8 * MIB,
        cluster: MIB,
        part: 2 * MIB,
        parts: vec![
            part(&[(0, MIB), (1, MIB)]),
            part(&[(1, 2 * MIB)]),
            part(&[]),
            part(&[(0, MIB / 8)]),
        ],
        stretch: MIB,
        levels,
    }
}

/// As many levels, each of which has one part of many.
pub fn chain(levels: usize) -> Layout {
    let size = 1000 * MIB;
    let mut layout = Layout {
        disk_size: size,
        cluster: MIB,
        part: MIB,
        parts: vec![Part::default(); 1000],
        stretch: MIB,
        levels: (0..levels).map(|_| level("a level", 1, 1)).collect(),
    };
    for depth in 0..levels {
        layout.parts[depth].held.push((depth, MIB));
        layout.levels[depth].seen = MIB;
    }
    layout
}

fn boxes(drawing: &Drawing, wanted: Color) -> u32 {
    let area = drawing.shapes.iter().map(|shape| match shape {
        Shape::Box {
            width,
            height,
            color,
            ..
        } if *color == wanted => width * height,
        _ => 0,
    });
    area.sum()
}

#[test]
fn all_is_on_the_page() {
    for layout in [two_levels(), chain(1), chain(7), chain(8), chain(126)] {
        let drawing = draw("a".repeat(1000).as_ref(), &layout);
        assert!(drawing.height < 1000, "{}", drawing.height);
        for shape in &drawing.shapes {
            let (right, bottom) = match shape {
                Shape::Box {
                    x,
                    y,
                    width,
                    height,
                    ..
                } => (x + width, y + height),
                Shape::Text {
                    x,
                    baseline,
                    text,
                    style,
                } => {
                    let width = |letter| letter * text.chars().count() as u32;
                    let right = match style {
                        Style::Title => x + width(10),
                        Style::Plain => x + width(7),
                        Style::Label => {
                            assert!(width(7) <= *x, "{text}");
                            *x
                        }
                    };
                    (right, baseline + 3)
                }
            };
            assert!(right <= WIDTH && bottom <= drawing.height, "{shape:?}");
        }
    }
}

#[test]
fn boxes_are_as_large_as_what_they_stand_for() {
    let drawing = draw("disk".as_ref(), &two_levels());
    let (line, swatch) = (CELL - 1, SWATCH * SWATCH);
    let cell = line * (CELL_HEIGHT - 1);
    // Half of a cell is a line more or less; a little is one.
    let half = cell / 2;
    let drawn = |color| boxes(&drawing, color);
    let is_about = |color, area| assert!(drawn(color).abs_diff(area) <= line, "{color:?}");
    is_about(LEVELS[0], half + line + swatch + 2 * BAR_HEIGHT);
    is_about(LEVELS[1], half + cell + swatch + 3 * BAR_HEIGHT);
    is_about(NOTHING, cell + cell - line + swatch);
    // Both files are drawn, and the legend.
    assert_eq!(drawn(darker(LEVELS[0])), 2 * BAR_HEIGHT + swatch);
    assert_eq!(drawn(darker(LEVELS[1])), BAR_HEIGHT);
    assert_eq!(drawn(METADATA), 2 * BAR_HEIGHT + swatch);
    assert_eq!(drawn(UNUSED), 2 * BAR_HEIGHT + swatch);
}

#[test]
fn an_svg_is_xml_that_says_what_was_drawn() {
    let drawing = draw("a & b\u{1b}".as_ref(), &two_levels());
    let bytes = svg::encode(&drawing).unwrap();
    let text = String::from_utf8(bytes).unwrap();
    assert!(!text.contains('\u{1b}'));
    let mut reader = Reader::from_str(&text);
    let mut boxes = 0;
    let mut said = String::new();
    loop {
        match reader.read_event().unwrap() {
            Event::Empty(element) if element.name().as_ref() == "rect" => boxes += 1,
            Event::Text(text) => said += &text,
            Event::Eof => break,
            _ => {}
        }
    }
    let drawn = drawing.shapes.iter();
    let drawn = drawn.filter(|shape| matches!(shape, Shape::Box { .. }));
    assert_eq!(boxes, drawn.count() + 1, "and the paper");
    assert!(said.contains("8 MiB in clusters of 1 MiB"), "{said}");
}

#[test]
fn a_png_has_the_boxes_and_the_letters() {
    let drawing = draw("disk".as_ref(), &two_levels());
    let bytes = png::encode(&drawing).unwrap();
    let mut reader = ::png::Decoder::new(Cursor::new(bytes)).read_info().unwrap();
    let mut pixels = vec![0; reader.output_buffer_size().unwrap()];
    let info = reader.next_frame(&mut pixels).unwrap();
    assert_eq!((info.width, info.height), (drawing.width, drawing.height));
    let pixels: Vec<&[u8]> = pixels.chunks_exact(3).collect();
    for shape in &drawing.shapes {
        if let Shape::Box {
            x,
            y,
            width,
            height,
            color,
        } = shape
        {
            let last = ((y + height - 1) * info.width + x + width - 1) as usize;
            assert_eq!(pixels[last], color, "{shape:?}");
        }
    }
    let ink = pixels.iter().filter(|pixel| **pixel == INK).count();
    assert!(ink > 2000, "{ink}");
    // Written anew, it is the same.
    assert_eq!(
        png::encode(&drawing).unwrap(),
        png::encode(&drawing).unwrap()
    );
}

#[test]
fn the_name_says_the_format() {
    for (name, kind) in [("a.svg", Kind::Svg), ("a.b.PNG", Kind::Png)] {
        assert_eq!(Kind::of(name.as_ref()), Ok(kind));
    }
    for name in ["a", "svg", ".svg", "a.jpg", "root.hds"] {
        let error = Kind::of(name.as_ref()).unwrap_err();
        assert!(error.contains(".svg or .png"), "{error}");
    }
}

#[test]
fn what_is_too_long_keeps_its_end() {
    assert_eq!(clipped(&"abc", 5), "abc");
    assert_eq!(clipped(&"abcdefghijklmnopqrst", 12), "a...mnopqrst");
}
