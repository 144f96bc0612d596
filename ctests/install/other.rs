//! A static library of another Rust project, with a copy of the standard library of its own.

#[unsafe(no_mangle)]
pub extern "C" fn other_answer(n: u32) -> u32 {
    let digits: Vec<String> = (0..n).map(|i| format!("{i}")).collect();
    let stopped = std::panic::catch_unwind(|| if n > 0 { std::panic::resume_unwind(Box::new(n)) });
    if stopped.is_err() { digits.concat().len() as u32 } else { 0 }
}
