//! A step that all threads attend at once, while each of them writes other sequences.

use super::attention::Over;
use super::{Live, Worker};
use crate::api::*;
use crate::model::*;
use crate::truth::View;
use std::ptr::null_mut;

/// A step that all threads attend, while others write other sequences.
pub(super) struct Crowd {
    pub batch: Handle<akv_batch>,
    pub members: Vec<(Live, usize)>,
    pub begun: bool,
}

impl Worker<'_, '_> {
    /// Attends the step that all threads share, or ends it and begins the next.
    pub(super) fn join_crowd(&mut self) {
        let world = self.world;
        if self.dice.one_in(100) {
            if let Some(mut crowd) = world.crowd.try_write() {
                self.next_of_crowd(&mut crowd);
            }
            return;
        }
        let Some(crowd) = world.crowd.try_read() else { return };
        if crowd.begun {
            let views = View::sequences(crowd.members.iter().map(|(live, n_q)| (&live.tokens[..], *n_q)));
            let layer = self.dice.below(world.setup.layers.len());
            self.attend(Over::Step(crowd.batch), layer, &views);
        }
    }

    pub(super) fn end_of_crowd(&mut self, crowd: &mut Crowd) {
        if crowd.begun {
            // SAFETY: a handle.
            let status = unsafe { akv_batch_commit(crowd.batch.0) };
            self.expect("commit", status, &[]);
            crowd.begun = false;
        }
    }

    fn next_of_crowd(&mut self, crowd: &mut Crowd) {
        self.end_of_crowd(crowd);
        while crowd.members.len() < 4 {
            let mut id = 0;
            // SAFETY: a handle and an output.
            let status = unsafe { akv_sequence_create(self.world.cache.0, &mut id) };
            if !self.expect("create", status, &[AKV_E_MEMORY]) {
                return;
            }
            crowd.members.push((Live { id, tokens: Vec::new() }, 0));
        }
        for (live, n_q) in &mut crowd.members {
            if live.tokens.len() > self.world.setup.max_len {
                // SAFETY: a handle and an id.
                let status = unsafe { akv_sequence_truncate(self.world.cache.0, live.id, 50) };
                if self.expect("truncate", status, &[AKV_E_MEMORY]) {
                    live.tokens.truncate(50);
                }
            }
            let n = 1 + self.dice.below(100);
            let (new, _) = new_tokens(&mut self.dice, n, live.tokens.last().map(|t| t.position));
            live.tokens.extend(new);
            *n_q = n;
        }
        let n_new: Vec<_> = crowd.members.iter().map(|m| m.1 as i32).collect();
        let ids: Vec<_> = crowd.members.iter().map(|m| m.0.id).collect();
        let of = |(live, n): &(Live, usize)| live.tokens[live.tokens.len() - n..].to_vec();
        let positions: Vec<_> = crowd.members.iter().flat_map(of).map(|t| t.position).collect();
        let n_q: Vec<_> = crowd.members.iter().enumerate().map(|(i, m)| m.1.min(i + 1) as i32).collect();
        let step = akv_batch_desc {
            struct_size: size::<akv_batch_desc>(),
            n_sequences: ids.len() as u32,
            sequences: ids.as_ptr(),
            n_new: n_new.as_ptr(),
            n_q: n_q.as_ptr(),
            positions: positions.as_ptr(),
            ..zeroed()
        };
        // SAFETY: a handle, a descriptor with its arrays.
        let status = unsafe { akv_batch_begin(crowd.batch.0, &step, null_mut()) };
        if !self.expect("begin", status, &[AKV_E_MEMORY]) {
            for (live, n) in &mut crowd.members {
                live.tokens.truncate(live.tokens.len() - *n);
            }
            return;
        }
        for layer in 0..self.world.setup.layers.len() {
            let members = &crowd.members;
            let n_new = positions.len();
            self.append(crowd.batch, layer, n_new, |m| members[m].1, |m| &members[m].0.tokens, members.len());
        }
        for (member, n_q) in crowd.members.iter_mut().zip(n_q) {
            member.1 = n_q as usize;
        }
        crowd.begun = true;
    }
}
