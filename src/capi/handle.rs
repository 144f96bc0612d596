//! Handles. A C handle is a number in a pointer's clothes and is never dereferenced, so whatever a caller passes (NULL,
//! freed, of another kind, of another copy of this library in the process) is recognised without touching memory:
//!
//! | bit 63 | 62..60 | 59..40 | 39..20 | 19..0 |
//! |---|---|---|---|---|
//! | 1: no user-space address | kind | copy of the library | generation | index in the kind's table |
//!
//! An object is destroyed only by whoever holds it alone: calls that use it and objects made from it each hold an
//! `Arc`, so that "in use" is one question with one answer.

use super::types::*;
use crate::{Error, Result};
use parking_lot::RwLock;
use std::marker::PhantomData;
use std::sync::Arc;

const _: () = assert!(usize::BITS == 64, "handles need 64 bits");

const FIELD: u64 = (1 << 20) - 1;
const KINDS: [&str; 8] = ["", "akv_context", "akv_cache", "akv_batch", "akv_mask", "", "", ""];

pub(super) static CONTEXTS: Table<akv_context, super::context::Object> = Table::new(1);
pub(super) static CACHES: Table<akv_cache, super::cache::Object> = Table::new(2);
pub(super) static MASKS: Table<akv_mask, super::slots::MaskObject> = Table::new(4);
pub(super) static BATCHES: Table<akv_batch, super::batch::Object> = Table::new(3);

/// Objects of type `T` that C knows as `*mut H`.
pub(super) struct Table<H, T> {
    kind: u64,
    slots: RwLock<Slots<T>>,
    _handle: PhantomData<fn(H)>,
}

struct Slots<T> {
    all: Vec<Slot<T>>,
    free: Vec<usize>,
}

struct Slot<T> {
    generation: u64,
    object: Option<Arc<T>>,
}

/// Two copies of the library have different statics. Pages suffice, and 20 bits of their numbers do for copies within
/// 4 GiB of each other, as a loader maps them.
fn copy_of_library() -> u64 {
    static HERE: u8 = 0;
    (&raw const HERE as u64 >> 12) & FIELD
}

impl<H, T> Table<H, T> {
    const fn new(kind: u64) -> Self {
        Table { kind, slots: RwLock::new(Slots { all: Vec::new(), free: Vec::new() }), _handle: PhantomData }
    }

    fn kind(&self) -> &'static str {
        KINDS[self.kind as usize]
    }

    pub fn insert(&self, object: T) -> Result<*mut H> {
        let mut slots = self.slots.write();
        let index = match slots.free.pop() {
            Some(index) => index,
            None if slots.all.len() as u64 > FIELD => {
                return Err(Error::Capacity(format!("{} objects of kind {} are alive", FIELD + 1, self.kind())));
            }
            None => {
                slots.all.push(Slot { generation: 0, object: None });
                slots.all.len() - 1
            }
        };
        let slot = &mut slots.all[index];
        slot.object = Some(Arc::new(object));
        let handle = 1 << 63 | self.kind << 60 | copy_of_library() << 40 | slot.generation << 20 | index as u64;
        Ok(std::ptr::without_provenance_mut(handle as usize))
    }

    /// The object of a live handle; `name` is the argument's, for the text.
    pub fn get(&self, handle: *const H, name: &str) -> Result<Arc<T>> {
        let index = self.index(handle, name)?;
        let slots = self.slots.read();
        slots.live(index, handle).cloned().ok_or_else(|| self.dead(name))
    }

    /// Takes an object out, unless anyone else holds it: then `busy` says who that may be.
    pub fn remove(&self, handle: *const H, name: &str, busy: &str) -> Result<T> {
        let index = self.index(handle, name)?;
        let mut slots = self.slots.write();
        if slots.live(index, handle).is_none() {
            return Err(self.dead(name));
        }
        let slot = &mut slots.all[index];
        let object = slot.object.take().ok_or_else(|| self.dead(name))?;
        // Nobody can get it meanwhile: that takes the lock.
        match Arc::try_unwrap(object) {
            Ok(object) => {
                slot.generation += 1;
                // A slot whose generations are used up is never used again.
                if slot.generation <= FIELD {
                    slots.free.push(index);
                }
                Ok(object)
            }
            Err(object) => {
                slot.object = Some(object);
                Err(Error::Busy(format!("{name} is in use: {busy}")))
            }
        }
    }

    /// What can be said about a handle without the table.
    fn index(&self, handle: *const H, name: &str) -> Result<usize> {
        let (bits, kind) = (handle as u64, self.kind());
        let problem = if bits == 0 {
            "is NULL".to_owned()
        } else if bits >> 63 == 0 {
            format!("is {bits:#x}, no handle at all")
        } else if bits >> 40 & FIELD != copy_of_library() {
            "is of another copy of the library in this process".to_owned()
        } else if bits >> 60 & 7 != self.kind {
            format!("is of type {}", KINDS[(bits >> 60 & 7) as usize])
        } else {
            return Ok((bits & FIELD) as usize);
        };
        Err(Error::Handle(format!("{name} {problem}: expected a live {kind}")))
    }

    fn dead(&self, name: &str) -> Error {
        Error::Handle(format!("{name} has been destroyed: expected a live {}", self.kind()))
    }
}

impl<T> Slots<T> {
    fn live<H>(&self, index: usize, handle: *const H) -> Option<&Arc<T>> {
        let slot = self.all.get(index)?;
        slot.object.as_ref().filter(|_| slot.generation == handle as u64 >> 20 & FIELD)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text<T: std::fmt::Debug>(result: Result<T>) -> String {
        match result.unwrap_err() {
            Error::Handle(text) => text,
            other => panic!("{other:?}"),
        }
    }

    fn raw(bits: u64) -> *mut akv_context {
        std::ptr::without_provenance_mut(bits as usize)
    }

    #[test]
    fn lives_from_insert_to_remove() {
        let table: Table<akv_context, u32> = Table::new(1);
        let (a, b) = (table.insert(7).unwrap(), table.insert(8).unwrap());
        assert_eq!((*table.get(a, "a").unwrap(), *table.get(b, "b").unwrap()), (7, 8));
        assert_eq!(table.remove(a, "a", "").unwrap(), 7);
        assert!(text(table.get(a, "context")).contains("context has been destroyed"));
        text(table.remove(a, "a", ""));
        // The slot is used again, under another generation.
        let c = table.insert(9).unwrap();
        assert_eq!(c as u64 & FIELD, a as u64 & FIELD);
        assert_ne!(c, a);
        text(table.get(a, "a"));
        assert_eq!(*table.get(c, "c").unwrap(), 9);
    }

    #[test]
    fn what_is_no_handle_is_told_apart() {
        let table: Table<akv_context, u32> = Table::new(1);
        let other: Table<akv_context, u32> = Table::new(2);
        let (a, cache) = (table.insert(7).unwrap(), other.insert(1).unwrap());
        assert!(a as u64 >> 63 == 1, "never an address");
        assert!(text(table.get(std::ptr::null(), "context")).contains("context is NULL"));
        let local = 0u64;
        assert!(text(table.get((&raw const local).cast(), "context")).contains("no handle at all"));
        assert!(text(table.get(cache, "context")).contains("of type akv_cache: expected a live akv_context"));
        assert!(text(table.get(raw(a as u64 ^ 1 << 40), "context")).contains("another copy"));
        text(table.get(raw(a as u64 + 1), "context"));
        text(table.get(raw(a as u64 + (1 << 20)), "context"));
        text(table.get(raw(u64::MAX), "context"));
    }

    #[test]
    fn nothing_in_use_is_destroyed() {
        let table: Table<akv_context, u32> = Table::new(1);
        let a = table.insert(7).unwrap();
        let held = table.get(a, "a").unwrap();
        assert!(matches!(table.remove(a, "a", "someone"), Err(Error::Busy(text)) if text == "a is in use: someone"));
        assert_eq!(*table.get(a, "a").unwrap(), 7);
        drop(held);
        assert_eq!(table.remove(a, "a", "").unwrap(), 7);
    }

    #[test]
    fn generations_run_out_rather_than_wrap() {
        let table: Table<akv_context, u32> = Table::new(1);
        let a = table.insert(7).unwrap();
        table.slots.write().all[0].generation = FIELD;
        let last = raw(a as u64 | FIELD << 20);
        assert_eq!(table.remove(last, "a", "").unwrap(), 7);
        assert_eq!(table.insert(8).unwrap() as u64 & FIELD, 1);
    }

    #[test]
    fn many_threads_one_winner() {
        let table: Table<akv_context, u32> = Table::new(1);
        for _ in 0..50 {
            let a = table.insert(7).unwrap() as usize;
            let removed: usize = std::thread::scope(|s| {
                let threads: Vec<_> = (0..4)
                    .map(|_| {
                        s.spawn(|| {
                            let a = std::ptr::without_provenance::<akv_context>(a);
                            usize::from(table.remove(a, "a", "").is_ok())
                        })
                    })
                    .collect();
                threads.into_iter().map(|t| t.join().unwrap()).sum()
            });
            assert_eq!(removed, 1);
        }
    }
}
