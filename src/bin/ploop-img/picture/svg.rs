//! A picture as SVG, which browsers and editors make larger without loss.

use std::io;

use quick_xml::Writer;
use quick_xml::events::BytesText;

use super::{Color, Drawing, FAINT, INK, PAPER, Shape, Style};

/// # Errors
/// None in fact: it is written to memory.
pub fn encode(drawing: &Drawing) -> io::Result<Vec<u8>> {
    let mut writer = Writer::new_with_indent(Vec::new(), b' ', 1);
    let (width, height) = (drawing.width.to_string(), drawing.height.to_string());
    let view = format!("0 0 {width} {height}");
    writer
        .create_element("svg")
        .with_attributes([
            ("xmlns", "http://www.w3.org/2000/svg"),
            ("viewBox", &view),
            ("width", &width),
            ("height", &height),
            ("shape-rendering", "crispEdges"),
            ("font-family", "monospace"),
        ])
        .write_inner_content(|writer| {
            let paper = Shape::Box {
                x: 0,
                y: 0,
                width: drawing.width,
                height: drawing.height,
                color: PAPER,
            };
            write(writer, &paper)?;
            drawing
                .shapes
                .iter()
                .try_for_each(|shape| write(writer, shape))
        })?;
    Ok(writer.into_inner())
}

fn write(writer: &mut Writer<Vec<u8>>, shape: &Shape) -> io::Result<()> {
    match shape {
        Shape::Box {
            x,
            y,
            width,
            height,
            color,
        } => {
            let [x, y, width, height] = [x, y, width, height].map(|n| n.to_string());
            let fill = hex(*color);
            writer
                .create_element("rect")
                .with_attributes([
                    ("x", &*x),
                    ("y", &y),
                    ("width", &width),
                    ("height", &height),
                    ("fill", &fill),
                ])
                .write_empty()?;
        }
        Shape::Text {
            x,
            baseline,
            text,
            style,
        } => {
            let (x, y) = (x.to_string(), baseline.to_string());
            // As wide as the letters of the other format, or nearly so.
            let (size, anchor, color) = match style {
                Style::Title => ("16", "start", INK),
                Style::Plain => ("11.6", "start", INK),
                Style::Label => ("11.6", "end", FAINT),
            };
            let fill = hex(color);
            writer
                .create_element("text")
                .with_attributes([
                    ("x", &*x),
                    ("y", &y),
                    ("font-size", size),
                    ("text-anchor", anchor),
                    ("fill", &fill),
                ])
                .write_text_content(BytesText::new(text))?;
        }
    }
    Ok(())
}

fn hex([red, green, blue]: Color) -> String {
    format!("#{red:02x}{green:02x}{blue:02x}")
}
