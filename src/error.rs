//! What can go wrong. Every variant is one status code of the C ABI; the text names the argument, its value and what
//! was expected of it.

/// An error; its text is what `akv_last_error` returns.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// An argument breaks the documented rules.
    #[error("{0}")]
    Argument(String),
    /// Valid, but not built (yet) or not on this machine.
    #[error("{0}")]
    Unsupported(String),
    /// The allocator returned nothing.
    #[error("out of memory: {0}")]
    Memory(String),
    /// A limit that the caller set (`max_bytes`, `max_sequences`, batch bounds) is reached.
    #[error("{0}")]
    Capacity(String),
    /// A handle or sequence id that is dead, or belongs to another object or another copy of the library.
    #[error("{0}")]
    Handle(String),
    /// NaN or infinity in K, V or q.
    #[error("{0}")]
    NonFinite(String),
    /// A finite value that the format cannot hold.
    #[error("{0}")]
    Range(String),
    /// The object is in use in a way that excludes this call.
    #[error("{0}")]
    Busy(String),
    /// Imported bytes are damaged.
    #[error("{0}")]
    Corrupt(String),
    /// A struct or file of a newer version.
    #[error("{0}")]
    Version(String),
    /// The device or its driver failed.
    #[error("{0}")]
    Device(String),
    /// A bug in the library.
    #[error("internal error: {0}")]
    Internal(String),
}

impl Error {
    /// The same of rows that cannot be stored or attended, with their place.
    pub(crate) fn at(self, place: impl std::fmt::Display) -> Error {
        match self {
            Error::NonFinite(text) => Error::NonFinite(format!("{place}: {text}")),
            Error::Range(text) => Error::Range(format!("{place}: {text}")),
            other => other,
        }
    }
}

/// Result of the library's own calls.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What `f` returns; a panic becomes an error.
pub(crate) fn caught<T>(f: impl FnOnce() -> Result<T>) -> Result<T> {
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(f)).unwrap_or_else(|panic| {
        let text =
            panic.downcast_ref::<&str>().map(|s| s.to_string()).or_else(|| panic.downcast_ref::<String>().cloned());
        Err(Error::Internal(text.unwrap_or_else(|| "panic".to_owned())))
    })
}

/// Room for `n` more elements, or an error instead of an abort.
pub(crate) fn reserve<T>(vec: &mut Vec<T>, n: usize) -> Result<()> {
    vec.try_reserve(n).map_err(|_| Error::Memory(format!("a table of {n} more entries")))
}

/// Items whose number is the caller's: memory for them is asked for, not taken for granted.
pub(crate) fn collect<T>(items: impl ExactSizeIterator<Item = Result<T>>) -> Result<Vec<T>> {
    let mut all = Vec::new();
    reserve(&mut all, items.len())?;
    for item in items {
        all.push(item?);
    }
    Ok(all)
}
