//! Where decisions come from: a seed, or the bytes of a fuzzer.

/// A hash of 64 bits.
pub fn mix(x: u64) -> u64 {
    let x = (x ^ (x >> 32)).wrapping_mul(0xd6e8_feb8_6659_fd93);
    let x = (x ^ (x >> 32)).wrapping_mul(0xd6e8_feb8_6659_fd93);
    x ^ (x >> 32)
}

/// A source of decisions.
pub enum Dice<'a> {
    Seeded(u64),
    /// Once they are used up, the first choice.
    Bytes(&'a [u8]),
}

impl Dice<'_> {
    /// True once a fuzzer's bytes are used up.
    pub fn is_empty(&self) -> bool {
        matches!(self, Dice::Bytes([]))
    }

    /// Any 64 bits.
    pub fn bits(&mut self) -> u64 {
        match self {
            Dice::Seeded(state) => {
                *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
                mix(*state)
            }
            Dice::Bytes(bytes) => little_endian(bytes, 8),
        }
    }

    /// A number below `n`.
    pub fn below(&mut self, n: usize) -> usize {
        match self {
            Dice::Seeded(_) => (self.bits() % n as u64) as usize,
            Dice::Bytes(bytes) => (little_endian(bytes, if n > 256 { 2 } else { 1 }) % n as u64) as usize,
        }
    }

    pub fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == n - 1
    }

    /// One of some.
    pub fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len())]
    }
}

fn little_endian(bytes: &mut &[u8], n: usize) -> u64 {
    let (now, later) = bytes.split_at(n.min(bytes.len()));
    *bytes = later;
    now.iter().rev().fold(0, |x, &b| x << 8 | u64::from(b))
}
