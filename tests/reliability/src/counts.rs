//! What a run did, and what it found.

use serde_json::{Value, json};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

macro_rules! counts {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// Counters; the last six are findings.
        #[derive(Debug, Default)]
        pub struct Counts { $($(#[$doc])* pub $name: AtomicU64,)* }

        impl Counts {
            /// As a JSON object.
            pub fn json(&self) -> Value {
                let mut all = serde_json::Map::new();
                $(all.insert(stringify!($name).to_owned(), json!(self.$name.load(Relaxed)));)*
                Value::Object(all)
            }

            /// Adds what another run wrote with [`Counts::json`].
            pub fn add(&self, other: &Value) {
                $(self.$name.fetch_add(other[stringify!($name)].as_u64().unwrap_or(0), Relaxed);)*
            }
        }
    };
}

counts! {
    /// Calls of the library that create, append, attend, fork, truncate, read back or destroy.
    operations,
    /// Allocations that failed, and calls with bad handles, rows or limits.
    faults_injected,
    /// Calls that came back AKV_E_BUSY, as they had to.
    busy,
    /// Output rows of a head that were held against float64.
    outputs_checked,
    /// Bounds (of outputs and of LSEs) that were held against float64.
    certificates_checked,
    /// Counts of tokens that were held against the model's: lengths, tokens attended, tokens in use.
    tokens_checked,
    /// Ends of a cache's life at which blocks and pages were counted.
    leaks_checked,
    /// Of the outputs: far off, with a bound that says so (no smaller than A, the weighted magnitude of V itself).
    off_as_certified,
    /// Tokens that were missing, or too many.
    lost_tokens,
    /// Pages, blocks and heap blocks that were left at the end.
    leaks,
    /// Ends of a process that were not its own.
    crashes,
    /// Outputs, rows and answers that are not what they must be.
    wrong_outputs,
    /// Errors larger than the bound that came with them.
    certificates_exceeded,
    /// Calls that returned what they must not.
    wrong_answers,
}

/// Adds to a counter.
pub fn add(counter: &AtomicU64, n: u64) {
    counter.fetch_add(n, Relaxed);
}

impl Counts {
    /// Findings of all kinds.
    pub fn findings(&self) -> u64 {
        let all = [
            &self.lost_tokens,
            &self.leaks,
            &self.crashes,
            &self.wrong_outputs,
            &self.certificates_exceeded,
            &self.wrong_answers,
        ];
        all.iter().map(|c| c.load(Relaxed)).sum()
    }
}

/// Notes a finding: counted, and told on stderr (the first few).
pub fn found(counter: &AtomicU64, n: u64, what: impl FnOnce() -> String) {
    static TOLD: AtomicU64 = AtomicU64::new(0);
    add(counter, n);
    if TOLD.fetch_add(1, Relaxed) < 20 {
        eprintln!("FOUND: {}", what());
    }
}
