//! Positions of the tokens of a sequence, never descending.

/// Runs of consecutive positions.
#[derive(Debug, Clone, Default)]
pub struct Positions {}

#[allow(unused_variables)]
impl Positions {
    /// Position of token `index`.
    pub fn at(&self, index: usize) -> i64 {
        todo!()
    }
    /// Number of tokens (of the first `len`) whose position is below `position`.
    pub fn below(&self, position: i64, len: usize) -> usize {
        todo!()
    }
}
