//! `libalignedkv`: an LLM's KV cache as precision-aligned digit planes, and decode attention that reads only the
//! digits that matter, with a certified error bound.
//!
//! The public surface is the C ABI in [`capi`]; `include/alignedkv.h` is generated from it. Inside, a call goes one
//! way: [`capi`] checks it, [`cache`] knows which pages it touches, a backend scans plane 0, [`alignment`] decides who
//! is read how finely, and the backend refines and sums. [`format`](mod@format) defines every number that is stored.

#![deny(unsafe_op_in_unsafe_fn, clippy::undocumented_unsafe_blocks)]
#![warn(missing_docs)]

pub mod alignment;
pub mod backend;
pub mod cache;
pub mod capi;
pub mod error;
pub mod format;

pub use error::{Error, Result};
