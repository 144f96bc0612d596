//! Memory from the caller's allocator or the system's, counted against a limit.

#[cfg(unix)]
use super::region::Regions;
use super::shared::Held;
use crate::backend::cuda::Device;
use crate::capi::types::{AKV_CPU, AKV_CUDA};
pub(super) use crate::error::reserve;
use crate::{Error, Result};
use parking_lot::Mutex;
use std::alloc::{alloc_zeroed, dealloc};
use std::ffi::c_void;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Blocks start on cache lines.
const ALIGN: usize = 64;

/// From here on pages and kept rows lie in regions, where the system has them: fresh memory that costs nothing until it
/// is used, as a cache of cells takes its memory long before its rows come.
const LARGE: usize = 1 << 15;

/// Where memory comes from.
#[derive(Debug, Clone, Default)]
pub enum Allocator {
    /// The process's heap.
    #[default]
    System,
    /// The caller's functions.
    Hooks(Hooks),
}

/// See `akv_alloc_fn`.
pub type AllocFn = unsafe extern "C" fn(*mut c_void, usize, usize, i32, *mut c_void) -> *mut c_void;
/// See `akv_dealloc_fn`.
pub type DeallocFn = unsafe extern "C" fn(*mut c_void, *mut c_void, usize, i32, *mut c_void);

/// The caller's allocation functions.
#[derive(Debug, Clone)]
pub struct Hooks {
    alloc: AllocFn,
    dealloc: DeallocFn,
    user: *mut c_void,
}

// SAFETY: the contract of `Allocator::hooks` lets any thread call the functions with `user`.
unsafe impl Send for Hooks {}
// SAFETY: as above.
unsafe impl Sync for Hooks {}

impl Allocator {
    /// # Safety
    /// The functions keep the promises of `akv_alloc_fn` and `akv_dealloc_fn` on any thread, for as long as anything
    /// allocated through them lives.
    pub unsafe fn hooks(alloc: AllocFn, dealloc: DeallocFn, user: *mut c_void) -> Allocator {
        Allocator::Hooks(Hooks { alloc, dealloc, user })
    }

    /// Zeroed bytes of the host, aligned to [`ALIGN`]; `bytes` > 0.
    fn alloc(&self, bytes: usize) -> Option<NonNull<u8>> {
        match self {
            Allocator::System => {
                let layout = std::alloc::Layout::from_size_align(bytes, ALIGN).ok()?;
                // SAFETY: the size is not 0.
                NonNull::new(unsafe { alloc_zeroed(layout) })
            }
            Allocator::Hooks(h) => {
                let p = h.alloc(bytes, AKV_CPU)?;
                // SAFETY: the hook gave `bytes` writable bytes.
                unsafe { p.write_bytes(0, bytes) };
                Some(p)
            }
        }
    }

    /// # Safety
    /// `p` came from `alloc(bytes)` of this allocator and is not used again.
    unsafe fn dealloc(&self, p: NonNull<u8>, bytes: usize) {
        match self {
            Allocator::System => {
                // SAFETY: `alloc` made this layout, and `p` with it.
                unsafe { dealloc(p.as_ptr(), std::alloc::Layout::from_size_align_unchecked(bytes, ALIGN)) }
            }
            // SAFETY: the contract.
            Allocator::Hooks(h) => unsafe { h.dealloc(p, bytes, AKV_CPU) },
        }
    }
}

impl Hooks {
    fn alloc(&self, bytes: usize, backend: i32) -> Option<NonNull<u8>> {
        // SAFETY: the contract of `Allocator::hooks`.
        let p = unsafe { (self.alloc)(self.user, bytes, ALIGN, backend, std::ptr::null_mut()) };
        NonNull::new(p.cast::<u8>())
    }

    /// # Safety
    /// `p` came from `alloc` with the same arguments and is not used again.
    unsafe fn dealloc(&self, p: NonNull<u8>, bytes: usize, backend: i32) {
        // SAFETY: the contract of `Allocator::hooks`.
        unsafe { (self.dealloc)(self.user, p.as_ptr().cast(), bytes, backend, std::ptr::null_mut()) };
    }
}

/// What a block is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Kind {
    /// A tile of all KV heads of a layer.
    Page,
    /// Rows kept as given.
    Kept,
    /// Tables and workspaces of a device: go back at once.
    Device,
    /// Anything else, on the host: goes back to the allocator at once.
    Other,
}

/// An allocator, a limit, and what has been taken.
#[derive(Debug)]
pub struct Memory {
    /// Where pages and kept rows lie; None = on the host.
    device: Option<Arc<Device>>,
    allocator: Allocator,
    limit: u64,
    taken: AtomicU64,
    waiting: AtomicU64,
    kept: AtomicU64,
    pages: AtomicU64,
    shared: AtomicU64,
    free: Mutex<Vec<Class>>,
    #[cfg(unix)]
    regions: Mutex<Regions>,
}

/// Free blocks of one kind and size: a list that runs through the blocks' own first bytes, so that freeing never
/// allocates.
#[derive(Debug)]
struct Class {
    kind: Kind,
    bytes: usize,
    n: u64,
    first: Option<NonNull<u8>>,
}

// SAFETY: a free block belongs to its list alone.
unsafe impl Send for Class {}

impl Class {
    fn push(&mut self, p: NonNull<u8>) {
        // SAFETY: a free block is ours, aligned, and at least ALIGN bytes long.
        unsafe { p.cast::<Option<NonNull<u8>>>().write(self.first) };
        self.first = Some(p);
        self.n += 1;
    }

    fn pop(&mut self) -> Option<NonNull<u8>> {
        let p = self.first?;
        // SAFETY: `push` wrote it.
        self.first = unsafe { p.cast::<Option<NonNull<u8>>>().read() };
        self.n -= 1;
        Some(p)
    }
}

impl Memory {
    /// On the host; `max_bytes` 0 = no limit.
    pub fn new(allocator: Allocator, max_bytes: u64) -> Arc<Memory> {
        Memory::with_device(allocator, None, max_bytes)
    }

    /// With pages and kept rows on a device, if there is one.
    pub fn with_device(allocator: Allocator, device: Option<Arc<Device>>, max_bytes: u64) -> Arc<Memory> {
        #[cfg(unix)]
        let regions = Mutex::new(Regions::new(device.clone()));
        Arc::new(Memory {
            device,
            allocator,
            limit: if max_bytes == 0 { u64::MAX } else { max_bytes },
            taken: AtomicU64::new(0),
            waiting: AtomicU64::new(0),
            kept: AtomicU64::new(0),
            pages: AtomicU64::new(0),
            shared: AtomicU64::new(0),
            free: Mutex::new(Vec::new()),
            #[cfg(unix)]
            regions,
        })
    }

    /// The device that pages lie on.
    pub fn device(&self) -> Option<&Arc<Device>> {
        self.device.as_ref()
    }

    fn device_of(&self, kind: Kind) -> Option<&Arc<Device>> {
        self.device.as_ref().filter(|_| kind != Kind::Other)
    }

    /// Bytes taken, blocks that wait for reuse included.
    pub fn taken(&self) -> u64 {
        self.taken.load(Relaxed)
    }

    /// Bytes in use.
    pub fn used(&self) -> u64 {
        self.taken().saturating_sub(self.waiting.load(Relaxed))
    }

    /// Bytes of rows kept as given.
    pub(super) fn kept(&self) -> u64 {
        self.kept.load(Relaxed)
    }

    /// Pages in use, waiting, and held by more than one sequence.
    pub(super) fn pages(&self) -> (u64, u64, u64) {
        let free = self.free.lock().iter().filter(|c| c.kind == Kind::Page).map(|c| c.n).sum();
        (self.pages.load(Relaxed), free, self.shared.load(Relaxed))
    }

    /// Fails at once if `bytes` are out of reach, so that a hopeless call does not first empty the allocator.
    pub(super) fn check(&self, bytes: usize) -> Result<()> {
        let (limit, used) = (self.limit, self.used());
        if used.saturating_add(bytes as u64) <= limit {
            return Ok(());
        }
        Err(Error::Capacity(format!("max_bytes {limit}: {used} in use, {bytes} more wanted")))
    }

    /// Counts `bytes` as taken, at the cost of blocks that wait for reuse.
    fn take(&self, bytes: usize) -> Result<()> {
        loop {
            let more = |taken: u64| taken.checked_add(bytes as u64).filter(|&sum| sum <= self.limit);
            match self.taken.fetch_update(Relaxed, Relaxed, more) {
                Ok(_) => return Ok(()),
                Err(taken) => {
                    let excess = taken.saturating_add(bytes as u64).saturating_sub(self.limit);
                    if !self.release(excess) {
                        let limit = self.limit;
                        return Err(Error::Capacity(format!("max_bytes {limit}: {taken} taken, {bytes} more wanted")));
                    }
                }
            }
        }
    }

    fn give(&self, bytes: usize) {
        self.taken.fetch_sub(bytes as u64, Relaxed);
    }

    /// Gives waiting blocks back to the allocator until that is `bytes`. False if there were none.
    fn release(&self, bytes: u64) -> bool {
        let mut released = 0;
        while released < bytes {
            // The allocator is not called under the lock: it is the caller's.
            let waiting = self.free.lock().iter_mut().find_map(|class| Some((class.pop()?, class.kind, class.bytes)));
            let Some((p, kind, size)) = waiting else { break };
            // SAFETY: the block was in the list, hence nobody's.
            unsafe { self.dealloc(kind, p, size) };
            self.waiting.fetch_sub(size as u64, Relaxed);
            self.give(size);
            released += size as u64;
        }
        released > 0
    }

    fn allocate(&self, kind: Kind, bytes: usize) -> Result<NonNull<u8>> {
        self.take(bytes)?;
        loop {
            if let Some(p) = self.alloc(kind, bytes)? {
                return Ok(p);
            }
            if !self.release(bytes as u64) {
                self.give(bytes);
                return Err(Error::Memory(format!("the allocator has no {bytes} bytes")));
            }
        }
    }

    /// A waiting block, if there is one. Makes the class that the block will go to when it is dropped.
    fn reuse(&self, kind: Kind, bytes: usize) -> Result<Option<NonNull<u8>>> {
        let mut free = self.free.lock();
        if let Some(class) = free.iter_mut().find(|c| c.kind == kind && c.bytes == bytes) {
            let p = class.pop();
            if p.is_some() {
                self.waiting.fetch_sub(bytes as u64, Relaxed);
            }
            return Ok(p);
        }
        reserve(&mut free, 1)?;
        free.push(Class { kind, bytes, n: 0, first: None });
        Ok(None)
    }
}

impl Memory {
    /// True if a block lies in a region.
    fn in_region(&self, kind: Kind, bytes: usize) -> bool {
        let large = bytes >= LARGE || self.device.is_some();
        let rows = matches!(kind, Kind::Page | Kind::Kept);
        cfg!(unix) && rows && large && matches!(self.allocator, Allocator::System)
    }

    fn alloc(&self, kind: Kind, bytes: usize) -> Result<Option<NonNull<u8>>> {
        #[cfg(unix)]
        if self.in_region(kind, bytes) {
            return self.regions.lock().alloc(bytes);
        }
        Ok(match (self.device_of(kind), &self.allocator) {
            (Some(_), Allocator::Hooks(hooks)) => hooks.alloc(bytes, AKV_CUDA),
            (Some(device), Allocator::System) => device.alloc(bytes),
            (None, allocator) => allocator.alloc(bytes),
        })
    }

    /// # Safety
    /// `p` came from `alloc` of the same kind and size, and is not used again.
    unsafe fn dealloc(&self, kind: Kind, p: NonNull<u8>, bytes: usize) {
        #[cfg(unix)]
        if self.in_region(kind, bytes) {
            // SAFETY: the contract.
            unsafe { self.regions.lock().dealloc(p) };
            return;
        }
        // SAFETY: the contract.
        unsafe {
            match (self.device_of(kind), &self.allocator) {
                (Some(_), Allocator::Hooks(hooks)) => hooks.dealloc(p, bytes, AKV_CUDA),
                (Some(device), Allocator::System) => device.free(p),
                (None, allocator) => allocator.dealloc(p, bytes),
            }
        }
    }

    /// True if blocks of a kind wait for reuse instead of going back at once: the list runs through their own bytes, which
    /// must be the host's. On a device, regions see to reuse.
    fn waits(&self, kind: Kind) -> bool {
        matches!(kind, Kind::Page | Kind::Kept) && self.device.is_none()
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        self.release(u64::MAX);
    }
}

/// Bytes aligned to 64, zeroed when new, given back on drop.
#[derive(Debug)]
pub struct Block {
    data: NonNull<u8>,
    bytes: usize,
    kind: Kind,
    memory: Arc<Memory>,
}

// SAFETY: a block owns its bytes, like `Box<[u8]>`.
unsafe impl Send for Block {}
// SAFETY: as above.
unsafe impl Sync for Block {}

impl Block {
    /// Bytes for any use.
    pub fn new(memory: &Arc<Memory>, bytes: usize) -> Result<Block> {
        Block::of(memory, Kind::Other, bytes)
    }

    /// A page or kept rows; one that waits for reuse holds what it held.
    pub(super) fn of(memory: &Arc<Memory>, kind: Kind, bytes: usize) -> Result<Block> {
        let bytes = bytes.max(ALIGN);
        let reused = if memory.waits(kind) { memory.reuse(kind, bytes)? } else { None };
        let data = match reused {
            Some(p) => p,
            None => memory.allocate(kind, bytes)?,
        };
        match kind {
            Kind::Page => memory.pages.fetch_add(1, Relaxed),
            Kind::Kept => memory.kept.fetch_add(bytes as u64, Relaxed),
            Kind::Device | Kind::Other => 0,
        };
        Ok(Block { data, bytes, kind, memory: memory.clone() })
    }
}

impl Block {
    /// Bytes of the memory's device, for any use; not zeroed.
    pub fn on_device(memory: &Arc<Memory>, bytes: usize) -> Result<Block> {
        Block::of(memory, Kind::Device, bytes)
    }

    /// Its address, which may be the device's.
    pub fn address(&self) -> u64 {
        self.data.as_ptr() as u64
    }

    /// Its size.
    pub fn size(&self) -> usize {
        self.bytes
    }

    /// Stops whoever takes a device's memory for the host's.
    #[inline(always)]
    fn expect_host(&self) {
        assert!(self.memory.device.is_none() || self.kind == Kind::Other, "the block is the device's");
    }

    /// Where it comes from.
    pub(super) fn memory(&self) -> &Arc<Memory> {
        &self.memory
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        let memory = &self.memory;
        match self.kind {
            Kind::Page => memory.pages.fetch_sub(1, Relaxed),
            Kind::Kept => memory.kept.fetch_sub(self.bytes as u64, Relaxed),
            Kind::Device | Kind::Other => 0,
        };
        if memory.waits(self.kind) {
            let mut free = memory.free.lock();
            if let Some(class) = free.iter_mut().find(|c| c.kind == self.kind && c.bytes == self.bytes) {
                class.push(self.data);
                memory.waiting.fetch_add(self.bytes as u64, Relaxed);
                return;
            }
        }
        // SAFETY: the block is going away.
        unsafe { memory.dealloc(self.kind, self.data, self.bytes) };
        memory.give(self.bytes);
    }
}

impl Deref for Block {
    type Target = [u8];
    #[inline(always)]
    fn deref(&self) -> &[u8] {
        self.expect_host();
        // SAFETY: `bytes` bytes, initialised when they were allocated, that this block owns.
        unsafe { std::slice::from_raw_parts(self.data.as_ptr(), self.bytes) }
    }
}

impl DerefMut for Block {
    fn deref_mut(&mut self) -> &mut [u8] {
        self.expect_host();
        // SAFETY: as above, and `&mut self` excludes other users.
        unsafe { std::slice::from_raw_parts_mut(self.data.as_ptr(), self.bytes) }
    }
}

/// A block that several sequences may hold.
pub(super) type Shared = super::shared::Shared<Block>;

impl Shared {
    pub fn new(memory: &Arc<Memory>, kind: Kind, bytes: usize) -> Result<Shared> {
        Ok(Shared::of(Block::of(memory, kind, bytes)?))
    }

    /// Its address, which may be the device's.
    pub fn address(&self) -> u64 {
        (**self).address()
    }

    /// Its size.
    pub fn size(&self) -> usize {
        (**self).size()
    }
}

/// Pages that more than one sequence holds are counted.
impl Held for Block {
    fn shared(&self, now: bool) {
        match (self.kind, now) {
            (Kind::Page, true) => _ = self.memory.shared.fetch_add(1, Relaxed),
            (Kind::Page, false) => _ = self.memory.shared.fetch_sub(1, Relaxed),
            _ => {}
        }
    }
}

/// Bytes of the process's heap that count as taken.
#[derive(Debug)]
pub(super) struct Charge {
    memory: Arc<Memory>,
    bytes: usize,
}

impl Charge {
    pub fn new(memory: &Arc<Memory>, bytes: usize) -> Result<Charge> {
        memory.take(bytes)?;
        Ok(Charge { memory: memory.clone(), bytes })
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        self.memory.give(self.bytes);
    }
}

/// A vector whose capacity is counted. It grows in two steps: one that can fail and changes nothing, one that cannot.
#[derive(Debug)]
pub(super) struct Table<T> {
    items: Vec<T>,
    charge: Charge,
}

impl<T> Table<T> {
    pub fn with_capacity(memory: &Arc<Memory>, n: usize) -> Result<Table<T>> {
        let charge = Charge::new(memory, n.saturating_mul(size_of::<T>()))?;
        let mut items = Vec::new();
        reserve(&mut items, n)?;
        Ok(Table { items, charge })
    }

    /// A larger table for [`Table::adopt`], if `n` more items do not fit.
    pub fn room(&self, n: usize) -> Result<Option<Table<T>>> {
        let (memory, need) = (&self.charge.memory, self.items.len().saturating_add(n));
        if need <= self.items.capacity() {
            return Ok(None);
        }
        let double = need.max(2 * self.items.capacity());
        Table::with_capacity(memory, double).or_else(|_| Table::with_capacity(memory, need)).map(Some)
    }

    pub fn adopt(&mut self, room: Option<Table<T>>) {
        if let Some(mut table) = room {
            table.items.append(&mut self.items);
            *self = table;
        }
    }

    /// Adds an item for which there is room.
    pub fn push(&mut self, item: T) {
        debug_assert!(self.items.len() < self.items.capacity());
        self.items.push(item);
    }

    /// Moves items over for which there is room.
    pub fn append(&mut self, other: &mut Table<T>) {
        debug_assert!(self.items.len() + other.items.len() <= self.items.capacity());
        self.items.append(&mut other.items);
    }

    pub fn pop(&mut self) -> Option<T> {
        self.items.pop()
    }

    pub fn truncate(&mut self, n: usize) {
        self.items.truncate(n);
    }

    pub fn memory(&self) -> &Arc<Memory> {
        &self.charge.memory
    }

    pub fn bytes(&self) -> usize {
        self.charge.bytes
    }
}

impl<T> Deref for Table<T> {
    type Target = [T];
    #[inline(always)]
    fn deref(&self) -> &[T] {
        &self.items
    }
}

impl<T> DerefMut for Table<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        &mut self.items
    }
}
