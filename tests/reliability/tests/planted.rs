//! The soak finds what is planted, and finds nothing where nothing is.

use serde_json::Value;
use std::process::Command;

/// Runs a short soak; its findings by name.
fn soak(plant: Option<&str>) -> (bool, Value) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_soak"));
    command.args(["--operations", "200", "--sequences", "30", "--threads", "8"]);
    if let Some(plant) = plant {
        command.args(["--plant", plant]);
    }
    let output = command.output().unwrap();
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    (output.status.success(), report["counts"].clone())
}

fn finds(plant: &str, counters: &[&str]) {
    let (success, counts) = soak(Some(plant));
    assert!(!success && counters.iter().all(|&c| counts[c].as_u64().unwrap() > 0), "{plant}: {counts}");
}

#[test]
fn nothing() {
    let (success, counts) = soak(None);
    assert!(success, "{counts}");
    for counter in ["operations", "faults_injected", "busy", "outputs_checked", "certificates_checked", "leaks_checked"]
    {
        assert!(counts[counter].as_u64().unwrap() > 10, "{counter}: {counts}");
    }
}

#[test]
fn wrong_outputs() {
    finds("output", &["wrong_outputs", "certificates_exceeded"]);
}

#[test]
fn bounds_that_are_too_small() {
    finds("certificate", &["certificates_exceeded"]);
}

#[test]
fn lost_tokens() {
    finds("token", &["lost_tokens"]);
}

#[test]
fn lost_cells() {
    finds("cell", &["lost_tokens"]);
}

#[test]
fn forgotten_sequences() {
    finds("leak", &["leaks"]);
}

#[test]
fn forgotten_blocks() {
    finds("heap", &["leaks"]);
}

#[test]
fn crashes() {
    finds("crash", &["crashes"]);
}
