//! Placeholder until its library part lands.
fn main() {}
