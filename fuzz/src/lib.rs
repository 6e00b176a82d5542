//! What the fuzz targets share.

pub mod disk;
pub mod driver;
pub mod engine;
pub mod front_end;
