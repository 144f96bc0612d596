//! Threads that wait for each other: with locks that ThreadSanitizer sees through, which those of the precompiled standard
//! library are not.

use parking_lot::{Condvar, Mutex};

/// A barrier of `n` threads.
pub struct Barrier {
    n: usize,
    /// Threads that wait, and how often all have come.
    waiting: Mutex<(usize, u64)>,
    all: Condvar,
}

impl Barrier {
    pub fn new(n: usize) -> Barrier {
        Barrier { n, waiting: Mutex::new((0, 0)), all: Condvar::new() }
    }

    pub fn wait(&self) {
        let mut waiting = self.waiting.lock();
        let round = waiting.1;
        waiting.0 += 1;
        if waiting.0 == self.n {
            *waiting = (0, round + 1);
            self.all.notify_all();
            return;
        }
        self.all.wait_while(&mut waiting, |waiting| waiting.1 == round);
    }
}

/// Runs `f(0)` to `f(n - 1)` at once. Joins every thread: a scope alone does not wait until they have given back all they
/// had.
pub fn together<T: Send>(n: usize, f: impl Fn(usize) -> T + Sync) -> Vec<T> {
    let f = &f;
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..n).map(|i| scope.spawn(move || f(i))).collect();
        threads.into_iter().map(|t| t.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))).collect()
    })
}
