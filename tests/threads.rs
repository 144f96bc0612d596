//! The threads of a call, below the C boundary.

mod common;

use alignedkv::Error;
use alignedkv::backend::cpu::{Cpu, Isa};
use alignedkv::backend::{Attention, Mode, Threads};
use alignedkv::cache::{Allocator, Block, Memory};
use alignedkv::format::{Dtype, Format, Layout, RowsMut};
use common::*;
use std::sync::Barrier;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

/// A thread that cannot make its call takes the others with it: all return its error, after as many barriers.
#[test]
fn an_error_of_one_is_an_error_of_all() {
    let shape = shape(1, 1, 16, 16, Dtype::F32, 4);
    let layout = Layout::new(Format::Aligned, shape);
    let cpu = Cpu::new(Isa::best(), 1).unwrap();
    let (q, mut out) = (Packed::new(&[], 1, 16, Dtype::F32), [0.0f32; 16]);
    for nth in [2, 3] {
        for failing in 0..nth {
            let mut block =
                Block::new(&Memory::new(Allocator::System, 0), Cpu::workspace_bytes(&layout, 1, nth)).unwrap();
            let workspace = block.as_mut_ptr() as usize;
            let (barrier, entered) = (Barrier::new(nth), AtomicUsize::new(0));
            let wait = || {
                entered.fetch_add(1, SeqCst);
                barrier.wait();
            };
            // SAFETY: no row is ever written.
            let rows = unsafe { RowsMut::new(out.as_mut_ptr().cast(), 64, 64, Dtype::F32, 16) };
            let call = Attention {
                shape: &shape,
                sequences: &[],
                rows: &[],
                q: q.rows(),
                out: rows,
                scale: 1.0,
                tolerance: 1e-3,
                mode: Mode::Expected,
                lse: None,
                bound: None,
                lse_bound: None,
                estimate: None,
                amplitude: None,
            };
            let (call, wait, cpu) = (&call, &wait, &cpu);
            std::thread::scope(|scope| {
                for ith in 0..nth {
                    scope.spawn(move || {
                        let fails = ith == failing;
                        let call = if fails { Err(Error::Busy("layer 0".to_owned())) } else { Ok(call) };
                        let threads = Threads { ith, nth, barrier: wait };
                        // SAFETY: large enough for a call without rows, and this call's alone.
                        let result = unsafe { cpu.attention(call, Some(threads), workspace as *mut u8) };
                        assert!(matches!(&result, Err(Error::Busy(text)) if text == "layer 0"), "{ith}: {result:?}");
                    });
                }
            });
            assert_eq!(entered.load(SeqCst) % nth, 0, "all enter the barrier equally often");
        }
    }
}
