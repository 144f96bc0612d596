//! Who is read how finely.
