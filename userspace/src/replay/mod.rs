//! See the module documentation in `docs/architecture.md`.
