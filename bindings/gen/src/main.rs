//! Writes `include/alignedkv.h` from the C ABI in `src/capi`. With `--check`, writes nothing and fails on a difference.

use std::path::Path;
use std::process::ExitCode;

fn main() -> ExitCode {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).expect("bindings/gen lies in the repository");
    let config = cbindgen::Config::from_file(root.join("cbindgen.toml")).expect("cbindgen.toml");
    let mut builder = cbindgen::Builder::new().with_config(config);
    // In the order in which a reader meets them.
    for file in ["types", "status", "context", "cache", "sequence", "batch", "attention", "slots"] {
        builder = builder.with_src(root.join("src/capi").join(file).with_extension("rs"));
    }
    let mut header = Vec::new();
    builder.generate().expect("cbindgen").write(&mut header);
    let header = String::from_utf8(header).expect("UTF-8");
    // Rust's safety notes say nothing to a C caller.
    let header = header.replace("//\n// # Safety\n// Pointers must be NULL or valid as described.\n", "");

    let path = root.join("include/alignedkv.h");
    if std::env::args().any(|a| a == "--check") {
        if std::fs::read_to_string(&path).unwrap_or_default() != header {
            eprintln!("include/alignedkv.h is not what src/capi says: run `make header`");
            return ExitCode::FAILURE;
        }
    } else {
        std::fs::write(&path, header).expect("include/alignedkv.h");
    }
    ExitCode::SUCCESS
}
