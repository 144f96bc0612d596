//! What the kernels of a step look up, on the device: sequences, tiles to append to, query rows. Written in stream order
//! when a step begins; at fixed addresses, so that a graph captured in one step is replayed in later ones.

use super::device::{Device, Event, Pinned, Stream, bytes_of};
use super::params::{Append, PokeParams, QueryRow, View};
use crate::cache::{Block, Memory, Plan};
use crate::format::TILE;
use crate::{Error, Result};
use std::sync::Arc;

/// Which tokens of its sequence a query row sees, by positions, and how.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sight {
    /// None after its own.
    pub causal: bool,
    /// 0 = all before.
    pub window: usize,
    /// First tokens that are seen in spite of it: 0 on a device.
    pub head: usize,
    /// All rows read all digits.
    pub dense: bool,
}

/// Ways of seeing that have a table of rows: those that attention calls have asked for, as they came.
const MAX_SIGHTS: usize = 4;

/// Steps whose tables can be on their way.
const IN_FLIGHT: usize = 4;

/// What the steps of a batch keep to.
#[derive(Debug, Clone, Copy)]
#[allow(missing_docs)]
pub struct Bounds {
    pub max_sequences: usize,
    pub max_q: usize,
    pub max_kv: usize,
}

/// How much a block of tables holds, and where.
#[derive(Debug, Clone, Copy, Default)]
struct Room {
    n_layers: usize,
    sequences: usize,
    appends: usize,
    rows: usize,
}

impl Room {
    fn views(&self, layer: usize) -> usize {
        layer * self.sequences * size_of::<View>()
    }

    fn appends(&self, layer: usize) -> usize {
        self.views(self.n_layers) + layer * self.appends * size_of::<Append>()
    }

    fn rows(&self, sight: usize) -> usize {
        self.appends(self.n_layers) + sight * self.rows * size_of::<QueryRow>()
    }

    fn bytes(&self) -> usize {
        self.rows(MAX_SIGHTS)
    }

    fn holds(&self, other: &Room) -> bool {
        self.sequences >= other.sequences && self.appends >= other.appends && self.rows >= other.rows
    }
}

/// Host memory that tables travel from.
#[derive(Debug)]
struct Staging {
    memory: Pinned,
    done: Event,
}

/// A stream's workspace.
#[derive(Debug)]
struct Scratch {
    stream: Stream,
    memory: Block,
    /// Its first bytes, which are 0.
    zeros: usize,
}

/// The tables of a batch.
#[derive(Debug)]
pub struct Tables {
    device: Arc<Device>,
    memory: Arc<Memory>,
    n_layers: usize,
    sights: Vec<Sight>,
    /// Those that the step's tables have.
    n_sights: usize,
    /// Of steps within the batch's bounds, if it has all of them.
    fixed: Option<(Room, Block)>,
    /// Of other steps.
    grown: Option<(Room, Block)>,
    in_fixed: bool,
    staging: [Option<Staging>; IN_FLIGHT],
    next: usize,
    workspaces: Vec<Scratch>,
    /// Of captured calls.
    captured: Option<Block>,
    /// Bytes at the start of every workspace that stay 0, at least.
    pub zeros: usize,
}

impl Tables {
    /// Of a batch over `n_layers` layers. With bounds there is room for its steps from now on, and a workspace of
    /// `workspace.0` bytes, of which the first `workspace.1` stay 0, so that they can be captured.
    pub fn new(
        memory: &Arc<Memory>,
        n_layers: usize,
        bounds: Option<Bounds>,
        workspace: (usize, usize),
    ) -> Result<Tables> {
        let device = memory.device().ok_or_else(|| Error::Internal("tables without a device".to_owned()))?.clone();
        let mut tables = Tables {
            device,
            memory: memory.clone(),
            n_layers,
            sights: Vec::new(),
            n_sights: 0,
            fixed: None,
            grown: None,
            in_fixed: false,
            staging: [const { None }; IN_FLIGHT],
            next: 0,
            workspaces: Vec::new(),
            captured: None,
            zeros: workspace.1,
        };
        if let Some(bounds) = bounds {
            let appends = 2 * bounds.max_sequences + bounds.max_q / TILE;
            let room = Room { n_layers, sequences: bounds.max_sequences, appends, rows: bounds.max_q };
            tables.fixed = Some((room, tables.cleared(room.bytes(), room.bytes())?));
            tables.captured = Some(tables.cleared(workspace.0, workspace.1)?);
        }
        Ok(tables)
    }

    /// Steps have tables for this way of seeing from the first on, as far as there is room.
    pub fn expect(&mut self, sight: Sight) {
        if !self.sights.contains(&sight) && self.sights.len() < MAX_SIGHTS {
            self.sights.push(sight);
        }
    }

    /// Memory of the device, of which the first bytes are 0 once this returns.
    fn cleared(&self, bytes: usize, zeros: usize) -> Result<Block> {
        let block = Block::on_device(&self.memory, bytes)?;
        // SAFETY: ours.
        unsafe { self.device.clear(block.address(), zeros.min(bytes), Stream::DEFAULT) }?;
        self.device.synchronize()?;
        Ok(block)
    }

    /// The step that the kernels to come on `stream` belong to. `rows` makes the query rows for a way of seeing.
    pub fn begin(&mut self, plan: &Plan, stream: Stream, rows: impl Fn(Sight) -> Result<Vec<QueryRow>>) -> Result<()> {
        let n_sequences = plan.views.len() / self.n_layers.max(1);
        let rows = crate::error::collect(self.sights.iter().map(|&sight| rows(sight)))?;
        let n_rows = rows.iter().map(Vec::len).max().unwrap_or(0);
        let need = Room { n_layers: self.n_layers, sequences: n_sequences, appends: plan.n_appends, rows: n_rows };
        let in_fixed = self.fixed.as_ref().is_some_and(|(room, _)| room.holds(&need));
        if !in_fixed && !self.grown.as_ref().is_some_and(|(room, _)| room.holds(&need)) {
            let more = |n: usize| n.next_power_of_two().max(16);
            let room =
                Room { sequences: more(need.sequences), appends: more(need.appends), rows: more(need.rows), ..need };
            self.grown = Some((room, Block::on_device(&self.memory, room.bytes())?));
        }
        let to = if in_fixed { &self.fixed } else { &self.grown };
        let Some((room, to)) = to.as_ref().map(|(room, block)| (*room, block.address())) else { return Ok(()) };

        let (tables, pokes) = (room.bytes(), bytes_of(&plan.pokes));
        let total = (tables + pokes.len()).next_multiple_of(256);
        let slot = &mut self.staging[self.next];
        if let Some(staging) = slot {
            staging.done.wait(&self.device)?;
            if staging.memory.bytes().len() < total
                && let Some(staging) = slot.take()
            {
                staging.memory.free(&self.device);
                staging.done.free(&self.device);
            }
        }
        let staging = match slot {
            Some(staging) => staging,
            None => {
                let memory = Pinned::new(&self.device, total + total / 2)?;
                slot.insert(Staging { memory, done: Event::new(&self.device)? })
            }
        };
        let address = staging.memory.address;
        let bytes = staging.memory.bytes();
        bytes[..tables].fill(0);
        let mut put = |at: usize, items: &[u8]| bytes[at..at + items.len()].copy_from_slice(items);
        for layer in 0..self.n_layers {
            put(room.views(layer), bytes_of(&plan.views[layer * n_sequences..][..n_sequences]));
            put(room.appends(layer), bytes_of(&plan.appends[layer * plan.n_appends..][..plan.n_appends]));
        }
        let none = vec![QueryRow { sequence: -1, ..QueryRow::default() }; room.rows];
        for sight in 0..MAX_SIGHTS {
            let of_step = rows.get(sight).map_or(&[][..], Vec::as_slice);
            put(room.rows(sight), bytes_of(of_step));
            put(room.rows(sight) + size_of_val(of_step), bytes_of(&none[of_step.len()..]));
        }
        put(tables, pokes);
        // SAFETY: device memory of the room's size, and a poke kernel over pinned memory that names the cache's listings.
        unsafe {
            self.device.upload(to, &bytes[..tables], stream)?;
            let call = PokeParams { pokes: address + tables as u64, n: plan.pokes.len() as u64 };
            let grid = [plan.pokes.len().div_ceil(256), 1, 1];
            self.device.launch(self.device.kernels()?.poke, grid, 0, &call, stream)?;
            // A graph that is replayed although the step is not within bounds finds nothing to do.
            if let (false, Some((room, block))) = (in_fixed, &self.fixed) {
                self.device.clear(block.address(), room.bytes(), stream)?;
            }
        }
        staging.done.record(&self.device, stream)?;
        self.next = (self.next + 1) % IN_FLIGHT;
        (self.in_fixed, self.n_sights) = (in_fixed, self.sights.len());
        Ok(())
    }

    fn current(&self, capturing: bool) -> Result<(&Room, u64)> {
        if capturing && !self.in_fixed {
            return Err(Error::Unsupported(
                "a step can be captured if max_sequences, max_q and max_kv of its batch are set and it keeps to them, \
                 with at most max_q new tokens"
                    .to_owned(),
            ));
        }
        let tables = if self.in_fixed { &self.fixed } else { &self.grown };
        let (room, block) = tables.as_ref().ok_or_else(|| Error::Internal("a step without tables".to_owned()))?;
        Ok((room, block.address()))
    }

    /// True if graphs that were captured in steps of the batch do this one's work.
    pub fn is_replayable(&self) -> bool {
        self.in_fixed
    }

    /// Views of the step's sequences in a layer.
    pub fn views(&self, layer: usize, capturing: bool) -> Result<u64> {
        let (room, start) = self.current(capturing)?;
        Ok(start + room.views(layer) as u64)
    }

    /// What is appended in a layer: address, and how many there are, or can be in a replay.
    pub fn appends(&self, layer: usize, n: usize, capturing: bool) -> Result<(u64, usize)> {
        let (room, start) = self.current(capturing)?;
        Ok((start + room.appends(layer) as u64, if capturing { room.appends } else { n }))
    }

    /// Query rows that see as `sight` says: address, and how many there are, or can be in a replay. None if the step's
    /// tables lack them; those of later steps will have them, as far as there is room.
    pub fn rows(&mut self, sight: Sight, n: usize, capturing: bool) -> Result<Option<(u64, usize)>> {
        let known = self.sights.iter().position(|&s| s == sight);
        self.expect(sight);
        let Some(at) = known.filter(|&at| at < self.n_sights) else { return Ok(None) };
        let (room, start) = self.current(capturing)?;
        Ok(Some((start + room.rows(at) as u64, if capturing { room.rows } else { n })))
    }

    /// A workspace for calls on a stream, or for captured ones, whose first `zeros` bytes are 0.
    pub fn workspace(&mut self, bytes: usize, zeros: usize, stream: Stream, capturing: bool) -> Result<u64> {
        if capturing {
            let block = self.captured.as_ref().filter(|block| block.size() >= bytes);
            let block =
                block.ok_or_else(|| Error::Unsupported("a batch without bounds cannot be captured".to_owned()))?;
            return Ok(block.address());
        }
        let found = self.workspaces.iter().position(|s| s.stream == stream && s.memory.size() >= bytes);
        let at = match found {
            Some(at) => at,
            None => {
                let memory = Block::on_device(&self.memory, bytes.next_power_of_two())?;
                self.workspaces.retain(|s| s.stream != stream);
                self.workspaces.push(Scratch { stream, memory, zeros: 0 });
                self.workspaces.len() - 1
            }
        };
        let scratch = &mut self.workspaces[at];
        let address = scratch.memory.address();
        if zeros > scratch.zeros {
            // SAFETY: ours; in the stream's order before the call that it is for.
            unsafe { self.device.clear(address, zeros, stream) }?;
        }
        scratch.zeros = zeros;
        Ok(address)
    }
}

impl Drop for Tables {
    fn drop(&mut self) {
        // Nothing may be reading what goes away now; if the device fails, nothing does.
        let _ = self.device.synchronize();
        for staging in self.staging.iter_mut().filter_map(Option::take) {
            staging.memory.free(&self.device);
            staging.done.free(&self.device);
        }
    }
}
