//! Puts what the programs of a record run wrote together, for benches/results.
//!
//!     report FOLDER TO
//!
//! reads soak.json, faults.json, fuzz.json (guided by coverage), fuzz-random.json, race.json in FOLDER and writes TO.json and TO.md.

use serde_json::{Value, json};
use std::process::ExitCode;

const FINDINGS: [&str; 6] =
    ["lost_tokens", "leaks", "crashes", "wrong_outputs", "certificates_exceeded", "wrong_answers"];

fn put_together(folder: &str, to: &str) -> Result<u64, String> {
    let read = |name: &str| -> Result<Value, String> {
        let path = format!("{folder}/{name}.json");
        let text = std::fs::read_to_string(&path).map_err(|e| format!("{path}: {e}"))?;
        serde_json::from_str(&text).map_err(|e| format!("{path}: {e}"))
    };
    let (soak, faults, fuzz, race) = (read("soak")?, read("faults")?, read("fuzz")?, read("race")?);
    let traffic = [&soak, &faults, &race];
    let sum = |of: &[&Value], field: &str| of.iter().filter_map(|r| r["counts"][field].as_u64()).sum::<u64>();
    let random = read("fuzz-random")?;
    let of_both = |field: &str| [&fuzz, &random].iter().map(|f| f[field].as_u64().unwrap_or(1)).sum::<u64>();
    let fuzz_findings = of_both("findings");
    let mut report = json!({
        "operations": sum(&traffic, "operations"),
        "faults_injected": sum(&traffic, "faults_injected"),
        "fuzz_inputs": of_both("fuzz_inputs"),
        "fuzz_inputs_guided": fuzz["fuzz_inputs"],
        "threads": soak["threads"],
        "sequences": soak["sequences"],
        "soak_minutes": soak["soak_minutes"],
        "outputs_checked": sum(&traffic, "outputs_checked"),
        "certificates_checked": sum(&traffic, "certificates_checked"),
        "off_as_certified": sum(&traffic, "off_as_certified"),
        "tokens_checked": sum(&traffic, "tokens_checked"),
        "leaks_checked": sum(&traffic, "leaks_checked"),
        "resident_mib_first": soak["resident_mib_first"],
        "resident_mib_last": soak["resident_mib_last"],
        "fuzz_cpu_minutes": fuzz["targets"].as_object().map(|t| t.values().filter_map(|v| v["cpu_minutes"].as_f64()).sum::<f64>().round()),
        "data_races": race["data_races"],
        "programs": { "soak": soak, "faults": faults, "fuzz": fuzz, "fuzz_random": random, "race": race },
    });
    for finding in FINDINGS {
        // A fuzzed input that goes wrong ends its process.
        let extra = if finding == "crashes" { fuzz_findings } else { 0 };
        report[finding] = json!(sum(&traffic, finding) + extra);
    }
    let findings: u64 =
        FINDINGS.iter().filter_map(|f| report[*f].as_u64()).sum::<u64>() + report["data_races"].as_u64().unwrap_or(1);
    let checks = |finding: &str| match finding {
        "lost_tokens" => json!(report["tokens_checked"]),
        "leaks" => json!(report["leaks_checked"]),
        "crashes" => json!(format!("{} operations, {} fuzzed inputs", report["operations"], report["fuzz_inputs"])),
        "wrong_outputs" => json!(report["outputs_checked"]),
        "certificates_exceeded" => json!(report["certificates_checked"]),
        _ => json!(report["operations"]),
    };
    let text = |v: &Value| v.as_str().map_or_else(|| v.to_string(), str::to_owned);
    let mut md = format!(
        "# Reliability\n\nWritten by `make soak`: {} minutes of random traffic over {} sequences at a time, and cells beside them, by one thread and by \
         {}, over one kind of cache after another (three formats, all modes), with allocations that fail; the allocations of \
         every operation failed one at a time (of many, a sample); fuzzed operations, descriptors and streams; the same traffic under \
         ThreadSanitizer.\n\n| | found | of |\n|---|---|---|\n",
        text(&report["soak_minutes"]),
        text(&report["sequences"]),
        text(&report["threads"])
    );
    for (name, finding) in [
        ("lost tokens", "lost_tokens"),
        ("leaks", "leaks"),
        ("crashes, hangs", "crashes"),
        ("wrong outputs", "wrong_outputs"),
        ("certificates exceeded", "certificates_exceeded"),
        ("wrong status codes, things changed by calls that failed", "wrong_answers"),
    ] {
        md += &format!("| {name} | {} | {} |\n", report[finding], text(&checks(finding)));
    }
    md += &format!(
        "| outputs far off, with a bound that says so | {} | {} |\n",
        report["off_as_certified"], report["outputs_checked"]
    );
    md += &format!(
        "| data races | {} | {} operations under ThreadSanitizer |\n\n| injected | |\n|---|---|\n| faults | {} |\n| fuzzed inputs | {}, of which {} \
         guided by coverage, under AddressSanitizer, in {} CPU minutes |\n| MiB resident after the first cycle of caches, after the last | {}, {} |\n",
        report["data_races"],
        race["counts"]["operations"],
        report["faults_injected"],
        report["fuzz_inputs"],
        report["fuzz_inputs_guided"],
        text(&report["fuzz_cpu_minutes"]),
        report["resident_mib_first"],
        report["resident_mib_last"]
    );
    md += "\nAllocations that failed, by operation: from the caller's allocator, then from the process's heap. Refused: AKV_E_MEMORY, \
           nothing changed. Done without: the call found another way. Ended: an allocation that Rust makes by itself, whose \
           failure ends the process, with the largest of them in bytes.\n\n\
           | operation | refused | refused (heap) | done without | ended (heap) | largest of these |\n|---|---|---|---|---|---|\n";
    for (name, op) in faults["operations"].as_object().into_iter().flatten() {
        md += &format!(
            "| `{name}` | {} | {} | {} | {} | {} |\n",
            op["refused"], op["refused_heap"], op["recovered"], op["ended"], op["ended_largest"]
        );
    }
    for (path, text) in [(format!("{to}.json"), format!("{report:#}\n")), (format!("{to}.md"), md)] {
        std::fs::write(&path, text).map_err(|e| format!("{path}: {e}"))?;
    }
    Ok(findings)
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().collect();
    let [_, folder, to] = &arguments[..] else {
        eprintln!("report FOLDER TO");
        return ExitCode::from(2);
    };
    match put_together(folder, to) {
        Ok(findings) => ExitCode::from(u8::from(findings > 0)),
        Err(error) => {
            eprintln!("report: {error}");
            ExitCode::from(2)
        }
    }
}
