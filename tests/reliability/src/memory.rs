//! Heaps that count, and run dry when they are told to.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::ffi::c_void;
use std::sync::atomic::{AtomicI64, AtomicPtr, AtomicU64, Ordering::Relaxed};

/// The process's heap: counts blocks, and fails one allocation of a thread that asked for it.
pub struct Heap;

static BLOCKS: AtomicI64 = AtomicI64::new(0);

thread_local! {
    /// Allocations of this thread until one fails; below 0: none does.
    static UNTIL_FAILURE: Cell<i64> = const { Cell::new(-1) };
}

/// Where the size of the allocation that failed is written: memory that outlives the process, if it comes to that.
static FAILED: AtomicPtr<AtomicU64> = AtomicPtr::new(std::ptr::null_mut());

// SAFETY: the system's allocator, but for a NULL now and then.
unsafe impl GlobalAlloc for Heap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if fails(layout.size()) {
            return std::ptr::null_mut();
        }
        BLOCKS.fetch_add(1, Relaxed);
        // SAFETY: the caller's contract.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, p: *mut u8, layout: Layout) {
        BLOCKS.fetch_sub(1, Relaxed);
        // SAFETY: the caller's contract.
        unsafe { System.dealloc(p, layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        if fails(layout.size()) {
            return std::ptr::null_mut();
        }
        BLOCKS.fetch_add(1, Relaxed);
        // SAFETY: the caller's contract.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, p: *mut u8, layout: Layout, bytes: usize) -> *mut u8 {
        if fails(bytes) {
            return std::ptr::null_mut();
        }
        // SAFETY: the caller's contract.
        unsafe { System.realloc(p, layout, bytes) }
    }
}

fn fails(bytes: usize) -> bool {
    let left = UNTIL_FAILURE.try_with(|left| left.replace(left.get().max(0) - 1)).unwrap_or(-1);
    if left == 0 {
        // SAFETY: NULL, or a word that lives for ever.
        if let Some(failed) = unsafe { FAILED.load(Relaxed).as_ref() } {
            failed.store(bytes as u64, Relaxed);
        }
    }
    left == 0
}

impl Heap {
    /// Blocks of the process that are in use.
    pub fn blocks() -> i64 {
        BLOCKS.load(Relaxed)
    }

    /// Runs `f`, in which this thread's `n`th allocation from now (0: the next) fails. True if it came to that.
    pub fn failing<T>(n: i64, f: impl FnOnce() -> T) -> (T, bool) {
        UNTIL_FAILURE.set(n);
        let result = f();
        (result, UNTIL_FAILURE.replace(-1) < 0)
    }

    /// Has the size of failed allocations written there.
    pub fn tell_failures(to: &'static AtomicU64) {
        FAILED.store((&raw const *to).cast_mut(), Relaxed);
    }
}

/// Behind `akv_context_desc.alloc`: counts, hands out memory full of garbage, and fails.
#[derive(Default)]
pub struct Hooks {
    pub blocks: AtomicI64,
    pub bytes: AtomicI64,
    pub calls: AtomicU64,
    /// The call of this number fails, counted from 1; 0: none.
    pub fail_at: AtomicU64,
    /// And about one in so many; 0: none.
    pub fail_one_in: AtomicU64,
    /// Larger blocks are refused; 0: none is.
    pub largest: AtomicU64,
    pub failed: AtomicU64,
    /// What a callback must not do: tried with this, once, from within the next allocation.
    pub misbehave: parking_lot::Mutex<Option<Box<dyn FnOnce() + Send>>>,
}

/// `akv_alloc_fn` of a [`Hooks`].
///
/// # Safety
/// `user` is a [`Hooks`] that outlives what it allocates.
pub unsafe extern "C" fn hook_alloc(
    user: *mut c_void,
    bytes: usize,
    align: usize,
    backend: i32,
    stream: *mut c_void,
) -> *mut c_void {
    // SAFETY: the contract.
    let hooks = unsafe { &*user.cast::<Hooks>() };
    assert!(align == 64 && backend == 1 && stream.is_null() && bytes > 0, "alloc({bytes}, {align}, {backend})");
    let call = hooks.calls.fetch_add(1, Relaxed) + 1;
    let (at, one_in, largest) =
        (hooks.fail_at.load(Relaxed), hooks.fail_one_in.load(Relaxed), hooks.largest.load(Relaxed));
    if let Some(misbehave) = hooks.misbehave.lock().take() {
        misbehave();
    }
    let refused = largest > 0 && bytes as u64 > largest;
    if refused || call == at || one_in > 0 && crate::dice::mix(call).is_multiple_of(one_in) {
        hooks.failed.fetch_add(1, Relaxed);
        return std::ptr::null_mut();
    }
    hooks.blocks.fetch_add(1, Relaxed);
    hooks.bytes.fetch_add(bytes as i64, Relaxed);
    // SAFETY: the size is not 0, and the block is as long as it says.
    unsafe {
        let p = System.alloc(Layout::from_size_align_unchecked(bytes, align));
        p.write_bytes(0xa5, bytes);
        p.cast()
    }
}

/// `akv_dealloc_fn` of a [`Hooks`].
///
/// # Safety
/// As [`hook_alloc`], and `p` came from it with the same `bytes`.
pub unsafe extern "C" fn hook_dealloc(user: *mut c_void, p: *mut c_void, bytes: usize, backend: i32, _: *mut c_void) {
    assert!(backend == 1);
    // SAFETY: the contract.
    unsafe {
        let hooks = &*user.cast::<Hooks>();
        hooks.blocks.fetch_sub(1, Relaxed);
        hooks.bytes.fetch_sub(bytes as i64, Relaxed);
        System.dealloc(p.cast(), Layout::from_size_align_unchecked(bytes, 64));
    }
}

/// Mebibytes of memory that the process has in RAM, without what malloc keeps for later; 0 where the system does not tell.
pub fn resident_mib() -> f64 {
    // SAFETY: gives back what is free, and nothing else.
    #[cfg(target_env = "gnu")]
    unsafe {
        libc::malloc_trim(0)
    };
    let text = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages = text.split(' ').nth(1).and_then(|n| n.parse::<f64>().ok()).unwrap_or(0.0);
    pages * 4096.0 / 1048576.0
}
