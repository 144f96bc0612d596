//! Memory from the caller's allocator or the system's, counted against a limit.

use crate::Result;
use std::ffi::c_void;
use std::ops::{Deref, DerefMut};
use std::sync::Arc;

/// Where memory comes from.
#[derive(Debug, Clone, Default)]
pub struct Allocator {}

#[allow(unused_variables)]
impl Allocator {
    /// The caller's functions.
    ///
    /// # Safety
    /// Both are as `akv_alloc_fn` and `akv_dealloc_fn` say, from any thread, for as long as the allocator is in use.
    pub unsafe fn hooks(
        alloc: unsafe extern "C" fn(*mut c_void, usize, usize, i32, *mut c_void) -> *mut c_void,
        dealloc: unsafe extern "C" fn(*mut c_void, *mut c_void, usize, i32, *mut c_void),
        user: *mut c_void,
    ) -> Allocator {
        todo!()
    }
}

/// An allocator, a limit, and what has been taken.
#[derive(Debug)]
pub struct Memory {}

/// Bytes aligned to 64 (huge pages where large), zeroed when new, given back on drop.
#[derive(Debug)]
pub struct Block {}

#[allow(unused_variables, missing_docs)]
impl Block {
    pub fn new(memory: &Arc<Memory>, bytes: usize) -> Result<Block> {
        todo!()
    }
}

impl Deref for Block {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        todo!()
    }
}

impl DerefMut for Block {
    fn deref_mut(&mut self) -> &mut [u8] {
        todo!()
    }
}
