//! The counts of what sequences share, under every order in which threads can come (loom): compiled from the library's own
//! source, with loom's atomics in place of the standard library's.

// Source files are written for a place inside the library.
#![allow(dead_code)]

use loom::cell::UnsafeCell;
use loom::sync::atomic::AtomicIsize;
use loom::thread;
use shared::{Held, Shared};
use sync::{Arc, Ordering};

mod sync {
    pub use loom::sync::Arc;
    pub use loom::sync::atomic::{AtomicUsize, Ordering};
}

#[path = "../src/cache/shared.rs"]
mod shared;

/// A page: memory that goes to the next owner, who writes it at once, when nobody holds it any more.
struct Page {
    memory: Arc<UnsafeCell<u32>>,
    n_shared: Arc<AtomicIsize>,
}

impl Page {
    fn new() -> (Shared<Page>, Arc<AtomicIsize>) {
        let (memory, n_shared) = (Arc::new(UnsafeCell::new(7)), Arc::new(AtomicIsize::new(0)));
        (Shared::of(Page { memory, n_shared: n_shared.clone() }), n_shared)
    }

    fn read(&self) -> u32 {
        // SAFETY: loom fails the test if another thread writes meanwhile, or before in no order with this.
        self.memory.with(|p| unsafe { *p })
    }

    fn write(&self, x: u32) {
        // SAFETY: as above, if another thread reads or writes.
        self.memory.with_mut(|p| unsafe { *p = x });
    }
}

impl Held for Page {
    fn shared(&self, now: bool) {
        // Between a holder's going and its being counted another may come: one too many for a moment, never one too few.
        let before = self.n_shared.fetch_add(if now { 1 } else { -1 }, Ordering::Relaxed);
        assert!(if now { (0..2).contains(&before) } else { (1..3).contains(&before) }, "shared {before} times");
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        self.write(0);
    }
}

#[test]
fn the_last_holder_hands_memory_on() {
    loom::model(|| {
        let (page, n_shared) = Page::new();
        let threads: Vec<_> = (0..2)
            .map(|_| {
                let page = page.clone();
                thread::spawn(move || assert_eq!(page.read(), 7))
            })
            .collect();
        assert_eq!(page.read(), 7);
        drop(page);
        threads.into_iter().for_each(|t| t.join().unwrap());
        assert_eq!(n_shared.load(Ordering::Relaxed), 0);
    });
}

#[test]
fn what_is_own_can_be_written() {
    loom::model(|| {
        let (mut page, n_shared) = Page::new();
        let other = page.clone();
        let thread = thread::spawn(move || assert_eq!(other.read(), 7));
        // A truncation writes a page that is its own, and copies one that is not.
        if page.is_own() {
            page.own().write(8);
            assert_eq!(page.read(), 8);
        }
        thread.join().unwrap();
        assert!(page.is_own());
        assert_eq!(n_shared.load(Ordering::Relaxed), 0);
    });
}

#[test]
fn forks_of_forks_are_counted_once() {
    loom::model(|| {
        let (page, n_shared) = Page::new();
        let other = page.clone();
        // Two sequences are forked and destroyed at once.
        let thread = thread::spawn(move || {
            let fork = other.clone();
            drop(other);
            assert_eq!(fork.read(), 7);
        });
        let fork = page.clone();
        drop(page);
        assert_eq!(fork.read(), 7);
        thread.join().unwrap();
        assert!(fork.is_own());
        assert_eq!(n_shared.load(Ordering::Relaxed), 0);
    });
}
