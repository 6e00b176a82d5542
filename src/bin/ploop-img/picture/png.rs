//! A picture as PNG, for where SVG is not shown. Letters that the built-in font has not, it
//! being one of Western Europe, are question marks.

use std::convert::Infallible;
use std::io;

use embedded_graphics::Drawable;
use embedded_graphics::Pixel;
use embedded_graphics::draw_target::DrawTarget;
use embedded_graphics::geometry::{OriginDimensions, Point, Size};
use embedded_graphics::mono_font::iso_8859_1::{FONT_7X13, FONT_10X20};
use embedded_graphics::mono_font::{MonoFont, MonoTextStyle};
use embedded_graphics::pixelcolor::{Rgb888, RgbColor};
use embedded_graphics::primitives::{PrimitiveStyle, Rectangle, StyledDrawable};
use embedded_graphics::text::{Alignment, Baseline, Text, TextStyleBuilder};
use png::{BitDepth, ColorType, Encoder, EncodingError};

use super::{Color, Drawing, FAINT, INK, PAPER, Shape, Style};

/// # Errors
/// None in fact: it is written to memory.
pub fn encode(drawing: &Drawing) -> io::Result<Vec<u8>> {
    let mut canvas = Canvas::new(drawing.width, drawing.height);
    for shape in &drawing.shapes {
        let Ok(()) = canvas.draw(shape);
    }
    let mut bytes = Vec::new();
    let mut encoder = Encoder::new(&mut bytes, drawing.width, drawing.height);
    encoder.set_color(ColorType::Rgb);
    encoder.set_depth(BitDepth::Eight);
    let written = encoder.write_header().and_then(|mut writer| {
        writer.write_image_data(&canvas.pixels)?;
        writer.finish()
    });
    written.map_err(|error| match error {
        EncodingError::IoError(error) => error,
        error => io::Error::other(error),
    })?;
    Ok(bytes)
}

/// Pixels from the left top, row by row.
struct Canvas {
    width: u32,
    height: u32,
    pixels: Vec<u8>,
}

impl Canvas {
    fn new(width: u32, height: u32) -> Self {
        let pixels = PAPER.repeat(width as usize * height as usize);
        Self {
            width,
            height,
            pixels,
        }
    }

    fn draw(&mut self, shape: &Shape) -> Result<(), Infallible> {
        match shape {
            Shape::Box {
                x,
                y,
                width,
                height,
                color,
            } => {
                let area = Rectangle::new(point(*x, *y), Size::new(*width, *height));
                area.draw_styled(&PrimitiveStyle::with_fill(rgb(*color)), self)
            }
            Shape::Text {
                x,
                baseline,
                text,
                style,
            } => {
                let (font, alignment, color): (&MonoFont<'_>, _, _) = match style {
                    Style::Title => (&FONT_10X20, Alignment::Left, INK),
                    Style::Plain => (&FONT_7X13, Alignment::Left, INK),
                    Style::Label => (&FONT_7X13, Alignment::Right, FAINT),
                };
                let style = TextStyleBuilder::new()
                    .alignment(alignment)
                    .baseline(Baseline::Alphabetic)
                    .build();
                let font = MonoTextStyle::new(font, rgb(color));
                let text = Text::with_text_style(text, point(*x, *baseline), font, style);
                text.draw(self).map(drop)
            }
        }
    }
}

impl OriginDimensions for Canvas {
    fn size(&self) -> Size {
        Size::new(self.width, self.height)
    }
}

impl DrawTarget for Canvas {
    type Color = Rgb888;
    type Error = Infallible;

    fn draw_iter<I>(&mut self, pixels: I) -> Result<(), Infallible>
    where
        I: IntoIterator<Item = Pixel<Rgb888>>,
    {
        for Pixel(at, color) in pixels {
            let (Ok(x), Ok(y)) = (u32::try_from(at.x), u32::try_from(at.y)) else {
                continue;
            };
            if x < self.width && y < self.height {
                let start = 3 * (y as usize * self.width as usize + x as usize);
                let color = [color.r(), color.g(), color.b()];
                self.pixels[start..start + 3].copy_from_slice(&color);
            }
        }
        Ok(())
    }
}

/// Coordinates are far below what would not fit.
fn point(x: u32, y: u32) -> Point {
    Point::new(x as i32, y as i32)
}

fn rgb([red, green, blue]: Color) -> Rgb888 {
    Rgb888::new(red, green, blue)
}
