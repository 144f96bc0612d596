//! The context's own threads: started when the context is made, joined when it goes.

use crate::{Error, Result};
use parking_lot::{Condvar, Mutex};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::thread::JoinHandle;

/// What a round runs: the same closure on every thread, which gets its index.
#[derive(Clone, Copy)]
struct Task(*const (dyn Fn(usize) + Sync));

// SAFETY: `Pool::run` does not return before every worker is done with the closure, which is Sync.
unsafe impl Send for Task {}

#[derive(Default)]
struct Round {
    number: u64,
    task: Option<Task>,
    running: usize,
    stop: bool,
}

#[derive(Default)]
struct Shared {
    /// Number of the round, for workers that have not gone to sleep yet.
    number: AtomicU64,
    round: Mutex<Round>,
    start: Condvar,
    end: Condvar,
}

/// Workers that wait for closures.
pub struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    in_use: Mutex<()>,
    /// The process that has the workers: a fork does not take threads along.
    process: u32,
}

impl std::fmt::Debug for Pool {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        write!(f, "Pool({})", self.workers.len())
    }
}

impl Pool {
    /// Starts `n_workers` threads.
    pub fn new(n_workers: usize) -> Result<Pool> {
        let mut pool =
            Pool { shared: Arc::default(), workers: Vec::new(), in_use: Mutex::new(()), process: std::process::id() };
        for ith in 1..=n_workers {
            let shared = Arc::clone(&pool.shared);
            let worker = std::thread::Builder::new()
                .name(format!("alignedkv-{ith}"))
                .spawn(move || work(&shared, ith))
                .map_err(|e| Error::Memory(format!("thread {ith} of {n_workers}: {e}")))?;
            pool.workers.push(worker);
        }
        Ok(pool)
    }

    fn has_workers(&self) -> bool {
        std::process::id() == self.process
    }

    /// Threads besides the caller's.
    pub fn n_workers(&self) -> usize {
        self.workers.len()
    }

    /// Runs `f(0)` here and `f(1..)` on the workers, and returns when all are done. False if another call has them, or this is
    /// a child process, where they are not.
    pub fn run(&self, f: &(dyn Fn(usize) + Sync)) -> bool {
        let Some(_in_use) = self.in_use.try_lock().filter(|_| self.has_workers()) else { return false };
        // SAFETY: only the lifetime changes, and the closure is not used after this call: see `Ended`.
        let task = Task(unsafe {
            std::mem::transmute::<*const (dyn Fn(usize) + Sync + '_), *const (dyn Fn(usize) + Sync + 'static)>(f)
        });
        {
            let mut round = self.shared.round.lock();
            round.number += 1;
            self.shared.number.store(round.number, Ordering::Release);
            round.task = Some(task);
            round.running = self.workers.len();
            self.shared.start.notify_all();
        }
        // Waits for the workers even if this thread's part panics.
        struct Ended<'a>(&'a Shared);
        impl Drop for Ended<'_> {
            fn drop(&mut self) {
                let mut round = self.0.round.lock();
                while round.running > 0 {
                    self.0.end.wait(&mut round);
                }
                round.task = None;
            }
        }
        let ended = Ended(&self.shared);
        f(0);
        drop(ended);
        true
    }
}

/// How often a worker looks for the next call before it sleeps: some tens of microseconds.
const SPINS: usize = 5000;

fn work(shared: &Shared, ith: usize) {
    let mut done = 0;
    loop {
        // Layers follow one another closely, and waking up takes as long as a short call.
        for _ in 0..SPINS {
            if shared.number.load(Ordering::Acquire) != done {
                break;
            }
            std::hint::spin_loop();
        }
        let task = {
            let mut round = shared.round.lock();
            while !round.stop && round.number == done {
                shared.start.wait(&mut round);
            }
            if round.stop {
                return;
            }
            done = round.number;
            round.task
        };
        if let Some(Task(f)) = task {
            // Closures catch their own panics; with one that does not, the round still ends.
            // SAFETY: `run` waits for `running` to reach 0 before its closure goes.
            let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| unsafe { (*f)(ith) }));
        }
        let mut round = shared.round.lock();
        round.running -= 1;
        if round.running == 0 {
            shared.end.notify_all();
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        if !self.has_workers() {
            // Nobody to be joined, and whoever held the lock at the fork holds it for ever.
            return self.workers.drain(..).for_each(std::mem::forget);
        }
        self.shared.round.lock().stop = true;
        self.shared.start.notify_all();
        for worker in self.workers.drain(..) {
            let _ = worker.join();
        }
    }
}

/// A barrier that spins before it yields: phases of a call are microseconds apart.
#[derive(Debug)]
pub struct SpinBarrier {
    n: usize,
    arrived: AtomicUsize,
    generation: AtomicUsize,
}

impl SpinBarrier {
    pub fn new(n: usize) -> SpinBarrier {
        SpinBarrier { n, arrived: AtomicUsize::new(0), generation: AtomicUsize::new(0) }
    }

    /// Returns when all `n` threads have come.
    pub fn wait(&self) {
        let generation = self.generation.load(Ordering::Acquire);
        if self.arrived.fetch_add(1, Ordering::AcqRel) + 1 == self.n {
            self.arrived.store(0, Ordering::Relaxed);
            self.generation.store(generation.wrapping_add(1), Ordering::Release);
            return;
        }
        let mut spins = 0u32;
        while self.generation.load(Ordering::Acquire) == generation {
            spins += 1;
            if spins < 10_000 {
                std::hint::spin_loop();
            } else {
                std::thread::yield_now();
            }
        }
    }
}
