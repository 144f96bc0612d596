//! What several sequences may hold. `tests/loom.rs` compiles this file against loom's atomics.

use super::sync::{Arc, AtomicUsize, Ordering};
use std::ops::Deref;

/// What is held: it is told when a second holder comes (`true`) and when one is left (`false`).
pub(super) trait Held {
    fn shared(&self, now: bool);
}

/// One holder's part of a `T`. Holders are counted beside `Arc`'s own count, which cannot tell without a race who was the
/// second to come or to go.
#[derive(Debug)]
pub(super) struct Shared<T: Held>(Arc<Counted<T>>);

#[derive(Debug)]
struct Counted<T> {
    holders: AtomicUsize,
    held: T,
}

impl<T: Held> Shared<T> {
    pub fn of(held: T) -> Shared<T> {
        Shared(Arc::new(Counted { holders: AtomicUsize::new(1), held }))
    }

    /// True if nobody else holds it. Only a holder can make another one, so it stays true.
    pub fn is_own(&self) -> bool {
        Arc::strong_count(&self.0) == 1
    }

    /// What nobody else holds, to be written.
    pub fn own(&mut self) -> &mut T {
        match Arc::get_mut(&mut self.0) {
            Some(counted) => &mut counted.held,
            None => unreachable!("what can be written is held once"),
        }
    }
}

impl<T: Held> Clone for Shared<T> {
    fn clone(&self) -> Shared<T> {
        if self.0.holders.fetch_add(1, Ordering::Relaxed) == 1 {
            self.0.held.shared(true);
        }
        Shared(self.0.clone())
    }
}

impl<T: Held> Drop for Shared<T> {
    fn drop(&mut self) {
        // Whoever lets go last gives the memory away, to be written by others: that is after all reading. `Arc` sees to it
        // by a fence; this order says the same to ThreadSanitizer, which does not know fences.
        if self.0.holders.fetch_sub(1, Ordering::AcqRel) == 2 {
            self.0.held.shared(false);
        }
    }
}

impl<T: Held> Deref for Shared<T> {
    type Target = T;
    #[inline(always)]
    fn deref(&self) -> &T {
        &self.0.held
    }
}
