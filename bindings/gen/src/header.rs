//! `include/alignedkv.h`, and what is in it.
//!
//! cbindgen knows the language; order and look are this program's: items stand in the order of the sources, constants
//! in groups (a `# heading` in the first one's documentation) with their comments beside them, functions under the
//! first line of their file.

use std::fmt::Write;
use std::path::Path;

const WIDTH: usize = 120;

/// What a source file defines.
struct Source {
    title: String,
    names: Vec<String>,
}

impl Source {
    fn new(text: &str) -> Source {
        const DEFINITIONS: [&str; 5] =
            ["pub const ", "pub type ", "pub struct ", "pub unsafe extern \"C\" fn ", "pub extern \"C\" fn "];
        let title = text.lines().next().unwrap_or_default().trim_start_matches("//! ").trim_end_matches('.').to_owned();
        let name = |line: &str| {
            let rest = DEFINITIONS.iter().find_map(|start| line.strip_prefix(start))?;
            rest.split(|c: char| !c.is_alphanumeric() && c != '_').next().map(str::to_owned)
        };
        Source { title, names: text.lines().filter_map(name).collect() }
    }
}

/// A declaration and the comment that belongs to it.
struct Item {
    heading: Option<String>,
    comment: Vec<String>,
    code: String,
    /// File and index in it.
    place: (usize, usize),
}

impl Item {
    /// Of what stands between two blank lines.
    fn new(block: &str, sources: &[Source]) -> Option<Item> {
        let (comment, code): (Vec<&str>, Vec<&str>) = block.lines().partition(|line| line.starts_with("//"));
        let mut comment: Vec<String> = comment.iter().map(|line| line[2..].trim().to_owned()).collect();
        let code = code.join("\n");
        // Rust's safety notes say nothing to a C caller.
        if let Some(i) = comment.iter().position(|line| line == "# Safety") {
            comment.truncate(i);
        }
        while comment.last().is_some_and(String::is_empty) {
            comment.pop();
        }
        let heading = comment.first().and_then(|line| line.strip_prefix("# ")).map(str::to_owned);
        if heading.is_some() {
            comment.remove(0);
        }
        let name = name_of(&code)?;
        let place = sources
            .iter()
            .enumerate()
            .find_map(|(file, source)| source.names.iter().position(|n| n == name).map(|index| (file, index)))?;
        Some(Item { heading, comment, code, place })
    }

    fn define(&self) -> Option<(&str, String)> {
        let (name, value) = self.code.strip_prefix("#define ")?.split_once(' ')?;
        let value = value.trim();
        Some((name, if value.starts_with('-') { format!("({value})") } else { value.to_owned() }))
    }
}

/// The name that a C declaration declares.
fn name_of(code: &str) -> Option<&str> {
    let is_name = |c: char| c.is_alphanumeric() || c == '_';
    if let Some(rest) = code.strip_prefix("#define ") {
        return rest.split_whitespace().next();
    }
    let before = match (code.starts_with("typedef"), code.find("(*")) {
        // typedef int (*name)(...);
        (true, Some(i)) if !code.contains('{') => {
            let rest = &code[i + 2..];
            return rest.split(')').next();
        }
        // typedef struct { ... } name;
        (true, _) => code.strip_suffix(';')?,
        // int name(...);
        (false, _) => &code[..code.find('(')?],
    };
    Some(&before[before.trim_end_matches(is_name).len()..])
}

/// A group of constants, their comments in a column beside them.
fn write_defines(header: &mut String, items: &[&Item]) {
    let defines: Vec<_> = items.iter().filter_map(|i| i.define()).collect();
    let name_width = defines.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    let value_width = defines.iter().map(|(_, value)| value.len()).max().unwrap_or(0);
    for (item, (name, value)) in items.iter().zip(&defines) {
        let code = format!("#define {name:name_width$} {value:value_width$}  ");
        let mut line = code.clone() + "//";
        for word in item.comment.join(" ").split(' ') {
            if line.len() + 1 + word.len() > WIDTH {
                let _ = writeln!(header, "{line}");
                line = " ".repeat(code.len()) + "//";
            }
            line = line + " " + word;
        }
        let _ = writeln!(header, "{line}");
    }
}

fn write_comment(header: &mut String, comment: &[String]) {
    for line in comment {
        let _ = writeln!(header, "{}", format!("// {line}").trim_end());
    }
}

/// The header.
pub fn generate(root: &Path) -> String {
    let config = cbindgen::Config::from_file(root.join("cbindgen.toml")).expect("cbindgen.toml");
    let mut builder = cbindgen::Builder::new().with_config(config);
    let mut sources = Vec::new();
    for path in crate::sources(root) {
        sources.push(Source::new(&std::fs::read_to_string(&path).expect("a source")));
        builder = builder.with_src(path);
    }
    let mut generated = Vec::new();
    builder.generate().expect("cbindgen").write(&mut generated);
    let generated = String::from_utf8(generated).expect("UTF-8");

    // What comes before the first item is the header's start; other blocks that are no items only close what it opens.
    let (mut start, mut items) = (Vec::new(), Vec::new());
    for block in generated.split("\n\n").map(str::trim).filter(|b| !b.is_empty()) {
        match Item::new(block, &sources) {
            Some(item) => items.push(item),
            None if items.is_empty() => start.push(block),
            None => {}
        }
    }
    let known: usize =
        sources.iter().map(|s| s.names.iter().filter(|n| n.to_lowercase().starts_with("akv_")).count()).sum();
    assert_eq!(items.len(), known, "every public item of src/capi has one declaration");
    items.sort_by_key(|item| item.place);

    let mut header = start.join("\n\n") + "\n";
    let mut at = 0;
    while at < items.len() {
        let item = &items[at];
        if item.place.0 > 0 && (at == 0 || items[at - 1].place.0 != item.place.0) {
            if item.place.0 == 1 {
                header += "\n#ifdef __cplusplus\nextern \"C\" {\n#endif\n";
            }
            let title = format!("// ---- {} ", sources[item.place.0].title);
            let _ = writeln!(header, "\n{title:-<WIDTH$}");
        }
        header.push('\n');
        if item.define().is_some() {
            let group = items[at + 1..].iter().take_while(|i| i.define().is_some() && i.heading.is_none()).count() + 1;
            if let Some(heading) = &item.heading {
                write_comment(&mut header, std::slice::from_ref(heading));
            }
            write_defines(&mut header, &items[at..at + group].iter().collect::<Vec<_>>());
            at += group;
        } else {
            write_comment(&mut header, &item.comment);
            let _ = writeln!(header, "{}", item.code);
            at += 1;
        }
    }
    header += "\n#ifdef __cplusplus\n}\n#endif\n\n#endif\n";
    header
}
