//! Writes `include/alignedkv.h` from the C ABI in `src/capi`. With `--check`, writes nothing and fails on a difference.
//!
//! cbindgen knows the language; the order and the look are this program's: items stand in the order of the sources,
//! constants in groups under a heading (`# ` in the first one's documentation), each with its comment beside it.

use std::fmt::Write;
use std::path::Path;
use std::process::ExitCode;

/// In the order in which a reader meets them.
const FILES: [&str; 8] = ["types", "status", "context", "cache", "sequence", "batch", "attention", "slots"];
const WIDTH: usize = 120;

/// A declaration and the comment that belongs to it.
struct Item {
    comment: Vec<String>,
    code: String,
    /// Where the sources define it.
    file: usize,
    place: usize,
}

impl Item {
    fn new(block: &str, sources: &[String]) -> Option<Item> {
        let (mut comment, mut code) = (Vec::new(), Vec::new());
        for line in block.lines() {
            match line.strip_prefix("//") {
                Some(text) if code.is_empty() => comment.push(text.trim().to_owned()),
                _ => code.push(line),
            }
        }
        // Rust's safety notes say nothing to a C caller.
        if let Some(i) = comment.iter().position(|line| line == "# Safety") {
            comment.truncate(i);
        }
        while comment.last().is_some_and(String::is_empty) {
            comment.pop();
        }
        let code = code.join("\n");
        let (file, place) = sources.iter().enumerate().find_map(|(file, source)| {
            let names = code.split(|c: char| !c.is_alphanumeric() && c != '_').filter(|w| w.to_lowercase().starts_with("akv_"));
            let places = names.flat_map(|name| {
                ["const", "type", "struct", "fn"].map(|kind| {
                    let definition = format!("pub {kind} {name}");
                    let exported = format!("extern \"C\" fn {name}(");
                    let at = |text: &str, end: &[char]| source.find(text).filter(|i| source[i + text.len()..].starts_with(end));
                    at(&definition, &[':', ' ', '(']).or_else(|| if kind == "fn" { source.find(&exported) } else { None })
                })
            });
            // The item's own name is the one whose definition says what the item is.
            places.flatten().max_by_key(|&p| own(&code, source, p)).map(|place| (file, place)).filter(|&(_, p)| own(&code, source, p))
        })?;
        Some(Item { comment, code, file, place })
    }
}

/// True if the definition at `place` is that of the item, not of a type it mentions.
fn own(code: &str, source: &str, place: usize) -> bool {
    let line = source[place..].lines().next().unwrap_or_default();
    let name = line.split(|c: char| !c.is_alphanumeric() && c != '_').find(|w| w.to_lowercase().starts_with("akv_"));
    let Some(name) = name else { return false };
    let forms = if line.starts_with("pub const") {
        vec![format!("#define {name} ")]
    } else if line.starts_with("extern") {
        vec![format!("{name}(")]
    } else {
        vec![format!(" {name};"), format!("(*{name})(")]
    };
    forms.iter().any(|form| code.contains(form.as_str()))
}
