//! What the programs of this folder share: a model of a cache and the traffic of an engine over it, in which every answer
//! of the library is held against float64 truth, the model, and what the header promises.
//!
//! | | |
//! |---|---|
//! | `soak` | random traffic for minutes, from one thread and from eight, with allocations that fail |
//! | `faults` | every allocation of every operation fails once; callbacks that misbehave |
//! | `fuzz` | bytes become operations, descriptors, streams to import |
//! | `report` | what these found, for benches/results |

// `!(error <= bound)` is true for NaN, as it must be.
#![allow(clippy::neg_cmp_op_on_partial_ord)]

pub mod api;
pub mod barrier;
pub mod counts;
pub mod dice;
pub mod fuzz;
pub mod memory;
pub mod model;
pub mod stream;
pub mod traffic;
pub mod truth;

#[global_allocator]
static HEAP: memory::Heap = memory::Heap;
