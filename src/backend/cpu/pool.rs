//! The context's own threads: started when the context is made, joined when it goes.

use crate::{Error, Result};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, TryLockError};
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

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Round> {
        self.round.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Workers that wait for closures.
pub struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    in_use: Mutex<()>,
}

impl std::fmt::Debug for Pool {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        write!(f, "Pool({})", self.workers.len())
    }
}

impl Pool {
    /// Starts `n_workers` threads.
    pub fn new(n_workers: usize) -> Result<Pool> {
        let mut pool = Pool { shared: Arc::default(), workers: Vec::new(), in_use: Mutex::new(()) };
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

    /// Threads besides the caller's.
    pub fn n_workers(&self) -> usize {
        self.workers.len()
    }

    /// Runs `f(0)` here and `f(1..)` on the workers, and returns when all are done. False if another call has them.
    pub fn run(&self, f: &(dyn Fn(usize) + Sync)) -> bool {
        let _in_use = match self.in_use.try_lock() {
            Ok(guard) => guard,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return false,
        };
        // SAFETY: only the lifetime changes, and the closure is not used after this call: see `Ended`.
        let task = Task(unsafe {
            std::mem::transmute::<*const (dyn Fn(usize) + Sync + '_), *const (dyn Fn(usize) + Sync + 'static)>(f)
        });
        {
            let mut round = self.shared.lock();
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
                let mut round = self.0.lock();
                while round.running > 0 {
                    round = self.0.end.wait(round).unwrap_or_else(PoisonError::into_inner);
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
            let mut round = shared.lock();
            while !round.stop && round.number == done {
                round = shared.start.wait(round).unwrap_or_else(PoisonError::into_inner);
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
        let mut round = shared.lock();
        round.running -= 1;
        if round.running == 0 {
            shared.end.notify_all();
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.lock().stop = true;
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
