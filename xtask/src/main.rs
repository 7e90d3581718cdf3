//! Builds, tests, demonstrates and runs twinwrite.
fn main() {}
