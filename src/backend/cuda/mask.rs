//! Who sees which cell, on a device: see `backend::mask` for what the parts mean.

use super::CELLS_SHARED_BYTES;
use super::device::{Device, Stream};
use super::params::{AttendParams, MaskParams};
use crate::cache::{Allocator, Block, Memory};
use crate::format::TILE;
use crate::{Error, Result};
use std::sync::Arc;

/// What query rows see of the cells of their stream, by tiles.
#[derive(Debug)]
pub struct Mask {
    device: Arc<Device>,
    tiles: usize,
    /// `[row][tile]`: cells that are seen, largest magnitude added, what is added.
    block: Block,
    peak: u64,
    added: u64,
}

impl Mask {
    /// Rows see nothing at first.
    pub fn new(device: &Arc<Device>, allocator: Allocator, max_rows: usize, max_kv: usize) -> Result<Mask> {
        let tiles = max_kv.div_ceil(TILE);
        let n = max_rows.checked_mul(tiles).filter(|&n| n <= i32::MAX as usize);
        let n = n.ok_or_else(|| Error::Memory("a mask of that many rows and cells".to_owned()))?;
        let (seen, peak, added) = (n * TILE / 8, n * size_of::<f32>(), n * TILE * size_of::<u16>());
        let memory = Memory::with_device(allocator, Some(device.clone()), 0);
        let block = Block::on_device(&memory, seen + added + peak)?;
        // SAFETY: ours.
        unsafe { device.clear(block.address(), seen, Stream::DEFAULT) }?;
        device.synchronize()?;
        let added = block.address() + seen as u64;
        let peak = block.address() + (seen + n * TILE * size_of::<u16>()) as u64;
        Ok(Mask { device: device.clone(), tiles, block, peak, added })
    }

    /// Sets rows from `first` on: of each `n_kv` f16, `stride` bytes from one to the next.
    ///
    /// # Safety
    /// They are the device's memory until the stream is done with them; rows and cells are within the mask's size.
    pub unsafe fn set(&self, first: usize, rows: usize, f16: u64, stride: usize, n_kv: usize, s: Stream) -> Result<()> {
        let at = (first * self.tiles) as u64;
        let call = MaskParams {
            f16,
            stride: stride as i64,
            seen: self.block.address() + at * (TILE / 8) as u64,
            peak: self.peak + at * size_of::<f32>() as u64,
            added: self.added + at * (TILE * size_of::<u16>()) as u64,
            fault: self.device.fault_address(),
            first_row: first as i64,
            n_kv: n_kv as i32,
            tiles: self.tiles as i32,
        };
        // SAFETY: the contract, and memory of ours.
        unsafe {
            self.device.launch(self.device.kernels()?.mask, [rows * self.tiles, 1, 1], CELLS_SHARED_BYTES, &call, s)
        }
    }

    /// Tells a call of it.
    pub fn place(&self, call: &mut AttendParams) {
        (call.mask_seen, call.mask_peak, call.mask_added) = (self.block.address(), self.peak, self.added);
        call.mask_tiles = self.tiles as i32;
    }
}
