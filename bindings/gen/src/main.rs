//! Writes everything that follows from the C ABI in `src/capi`: `include/alignedkv.h`, the list of exported symbols, and
//! the raw layers of the Go and C# bindings. With `--check`, writes nothing and fails if a committed file differs.

mod abi;
mod csharp;
mod go;
mod header;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// The files of `src/capi` that declare something, in the order in which a reader meets them.
const FILES: [&str; 8] = ["types", "status", "context", "cache", "sequence", "batch", "attention", "slots"];

fn sources(root: &Path) -> Vec<PathBuf> {
    let directory = root.join("src/capi");
    for entry in std::fs::read_dir(&directory).expect("src/capi") {
        let path = entry.expect("an entry").path();
        let text = std::fs::read_to_string(&path).unwrap_or_default();
        let listed = path.file_stem().is_some_and(|stem| FILES.iter().any(|f| stem == *f));
        assert!(listed || !text.contains("no_mangle"), "{} exports functions: add it to FILES", path.display());
    }
    FILES.iter().map(|file| directory.join(file).with_extension("rs")).collect()
}

fn main() -> ExitCode {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).expect("bindings/gen lies in the repository");
    let abi = abi::Abi::read(&sources(root));
    let outputs = [
        ("include/alignedkv.h", header::generate(root)),
        ("bindings/abi/symbols.txt", abi.symbols()),
        ("bindings/go/zabi.go", go::raw(&abi)),
        ("bindings/go/zerrors.go", go::errors(&abi)),
        ("bindings/csharp/src/Native.g.cs", csharp::raw(&abi, &sources(root))),
        ("bindings/csharp/src/Status.g.cs", csharp::status(&abi)),
        ("bindings/csharp/test/Layout.g.cs", csharp::layout(&abi)),
    ];
    let check = std::env::args().any(|a| a == "--check");
    let mut stale = false;
    for (path, text) in outputs {
        let file = root.join(path);
        if std::fs::read_to_string(&file).unwrap_or_default() == text {
            continue;
        }
        if check {
            eprintln!("{path} is not what src/capi says: run `make header`");
            stale = true;
        } else {
            std::fs::create_dir_all(file.parent().expect("a folder")).expect(path);
            std::fs::write(&file, text).expect(path);
        }
    }
    if stale { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}
