//! `ploop-img` makes, checks and changes ploop disk images.

fn main() {}
