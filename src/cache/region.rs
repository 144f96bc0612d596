//! Large blocks side by side in regions of the address space, backed by huge pages where the system has them. Attention
//! reads a little of every page of a long context: with small pages of memory it would miss the translation buffer at
//! every tile. On a device regions spare it an allocation per page.

use super::memory::reserve;
use crate::Result;
use crate::backend::cuda::Device;
use std::ptr::NonNull;
use std::sync::Arc;

/// Bytes of a huge page, on every architecture that has 4 KiB pages.
const HUGE: usize = 2 << 20;

/// Bytes of a region that holds several blocks.
const REGION: usize = 64 << 20;

/// Regions of one [`super::Memory`].
#[derive(Debug, Default)]
pub(super) struct Regions {
    all: Vec<Region>,
    device: Option<Arc<Device>>,
}

/// Blocks of one size.
#[derive(Debug)]
struct Region {
    start: NonNull<u8>,
    bytes: usize,
    /// From block to block: whole pages of memory.
    stride: usize,
    n_blocks: usize,
    n_used: usize,
    /// Bit per block.
    used: Vec<u64>,
    device: Option<Arc<Device>>,
}

// SAFETY: a region owns its memory.
unsafe impl Send for Region {}

/// Blocks on a device start on multiples of this.
const DEVICE_ALIGN: usize = 512;

impl Regions {
    /// Of a device, or of the host.
    pub fn new(device: Option<Arc<Device>>) -> Regions {
        Regions { all: Vec::new(), device }
    }

    /// Memory, aligned to a page of memory and zeroed on the host. None if there is none left.
    pub fn alloc(&mut self, bytes: usize) -> Result<Option<NonNull<u8>>> {
        let stride = bytes.next_multiple_of(if self.device.is_some() { DEVICE_ALIGN } else { page_bytes() });
        // The newest first: older ones are full unless much has been given back.
        let found = self.all.iter_mut().rev().find(|r| r.stride == stride && r.n_used < r.n_blocks);
        if let Some(region) = found {
            return Ok(Some(region.take()));
        }
        reserve(&mut self.all, 1)?;
        let Some(mut region) = Region::new(stride, self.device.clone())? else { return Ok(None) };
        let block = region.take();
        self.all.push(region);
        Ok(Some(block))
    }

    /// Gives a block back.
    ///
    /// # Safety
    /// It came from `alloc`, and is not used again.
    pub unsafe fn dealloc(&mut self, block: NonNull<u8>) {
        let at = block.as_ptr() as usize;
        let holds =
            |r: &Region| (r.start.as_ptr() as usize..).contains(&at) && at - (r.start.as_ptr() as usize) < r.bytes;
        let Some(i) = self.all.iter().position(holds) else { unreachable!("a block lies in its region") };
        let region = &mut self.all[i];
        // SAFETY: the contract.
        unsafe { region.give(block) };
        if region.n_used == 0 {
            self.all.swap_remove(i);
        }
    }
}

impl Region {
    fn new(stride: usize, device: Option<Arc<Device>>) -> Result<Option<Region>> {
        let n_blocks = (REGION / stride).max(1);
        let mut used = Vec::new();
        reserve(&mut used, n_blocks.div_ceil(64))?;
        used.resize(n_blocks.div_ceil(64), 0);
        let Some(bytes) = stride.checked_mul(n_blocks).and_then(|bytes| bytes.checked_next_multiple_of(HUGE)) else {
            return Ok(None);
        };
        let start = device.as_ref().map_or_else(|| map(bytes), |device| device.alloc(bytes));
        Ok(start.map(|start| Region { start, bytes, stride, n_blocks, n_used: 0, used, device }))
    }

    /// A block; there is a free one.
    fn take(&mut self) -> NonNull<u8> {
        let word = self.used.iter().position(|&word| word != u64::MAX).unwrap_or(0);
        let bit = (!self.used[word]).trailing_zeros() as usize;
        self.used[word] |= 1 << bit;
        self.n_used += 1;
        // SAFETY: blocks are taken from the lowest, so its number is below `n_blocks`.
        unsafe { self.start.add((64 * word + bit) * self.stride) }
    }

    /// # Safety
    /// A block of this region that nobody uses.
    unsafe fn give(&mut self, block: NonNull<u8>) {
        let i = (block.as_ptr() as usize - self.start.as_ptr() as usize) / self.stride;
        debug_assert!(self.used[i / 64] >> (i % 64) & 1 == 1);
        self.used[i / 64] &= !(1 << (i % 64));
        self.n_used -= 1;
        if self.device.is_some() {
            return;
        }
        // SAFETY: whole pages of memory that are this block's alone.
        unsafe {
            if libc::madvise(block.as_ptr().cast(), self.stride, libc::MADV_DONTNEED) != 0 {
                // Locked in memory: the next to come still finds zeros.
                block.write_bytes(0, self.stride);
            }
        }
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: what `map` or the device returned; blocks have been given back.
        unsafe {
            match &self.device {
                Some(device) => device.free(self.start),
                None => _ = libc::munmap(self.start.as_ptr().cast(), self.bytes),
            }
        }
    }
}

fn page_bytes() -> usize {
    // SAFETY: reads a constant of the system.
    usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap_or(HUGE)
}

/// Fresh memory that starts with a huge page; `bytes` is a multiple of one.
fn map(bytes: usize) -> Option<NonNull<u8>> {
    let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    let all = bytes.checked_add(HUGE)?;
    // SAFETY: a new mapping anywhere; what is cut off below is nobody's yet.
    unsafe {
        let p = libc::mmap(std::ptr::null_mut(), all, protection, flags | libc::MAP_NORESERVE, -1, 0);
        if p == libc::MAP_FAILED {
            return None;
        }
        let ahead = p.cast::<u8>().align_offset(HUGE);
        let start = p.cast::<u8>().add(ahead);
        if ahead > 0 {
            libc::munmap(p, ahead);
        }
        if ahead < HUGE {
            libc::munmap(start.add(bytes).cast(), HUGE - ahead);
        }
        // A hint. A small cache does without: its first blocks would cost a whole huge page.
        #[cfg(target_os = "linux")]
        if bytes > HUGE {
            libc::madvise(start.add(HUGE).cast(), bytes - HUGE, libc::MADV_HUGEPAGE);
        }
        NonNull::new(start)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_apart_and_zeroed() {
        let mut regions = Regions::default();
        // More than a region's worth, another size between, and one that is larger than a region.
        let sizes: Vec<usize> =
            (0..150).map(|i| if i % 7 == 3 { 40_000 } else { 1 << 20 }).chain([100 << 20]).collect();
        let alloc = |regions: &mut Regions, bytes: usize, mark: u8| {
            let p = regions.alloc(bytes).unwrap().unwrap();
            // SAFETY: the block's own bytes.
            let block = unsafe { std::slice::from_raw_parts_mut(p.as_ptr(), bytes) };
            assert!([0, bytes / 2, bytes - 1].iter().all(|&i| block[i] == 0), "not zeroed");
            for i in [0, bytes / 2, bytes - 1] {
                block[i] = mark;
            }
            p
        };
        let marked = |p: NonNull<u8>, bytes: usize, mark: u8| {
            // SAFETY: the block's own bytes.
            let block = unsafe { std::slice::from_raw_parts(p.as_ptr(), bytes) };
            [0, bytes / 2, bytes - 1].iter().all(|&i| block[i] == mark)
        };
        let mut blocks: Vec<_> =
            sizes.iter().enumerate().map(|(i, &bytes)| alloc(&mut regions, bytes, i as u8 + 1)).collect();
        assert!(regions.all.len() > 3);
        let n_regions = regions.all.len();
        for (i, block) in blocks.iter_mut().enumerate().filter(|(i, _)| i % 3 == 0) {
            // SAFETY: replaced at once.
            unsafe { regions.dealloc(*block) };
            *block = alloc(&mut regions, sizes[i], i as u8 + 1);
        }
        assert_eq!(regions.all.len(), n_regions, "what was given back is used again");
        for (i, (&block, &bytes)) in blocks.iter().zip(&sizes).enumerate() {
            assert!(marked(block, bytes, i as u8 + 1), "block {i}");
            // SAFETY: not used again.
            unsafe { regions.dealloc(block) };
        }
        assert!(regions.all.is_empty());
    }

    #[test]
    fn no_memory_is_no_panic() {
        assert!(Regions::default().alloc(usize::MAX / 2 - HUGE).unwrap().is_none());
    }
}
