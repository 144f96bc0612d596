//! The C ABI: the only `extern "C"` of the library. Every function goes through [`guard`], which turns errors and
//! panics into codes; validation is here, work is elsewhere. One file per C object. Outputs are written on success
//! only. `include/alignedkv.h` is generated from these files (`bindings/gen`).
//!
//! [`handle`] turns handles into objects, [`check`] reads what callers pass.

pub mod attention;
pub mod batch;
pub mod cache;
mod check;
pub mod context;
mod device;
mod handle;
pub mod sequence;
pub mod slots;
pub mod status;
#[cfg(test)]
mod tests;
pub mod types;

use crate::Result;
use types::*;

/// Runs the body of a C function: an error or a panic becomes a status and this thread's last error.
fn guard(body: impl FnOnce() -> Result<()>) -> akv_status {
    match crate::error::caught(body) {
        Ok(()) => AKV_OK,
        Err(error) => status::fail(&error),
    }
}
