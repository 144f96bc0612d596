//! The fuzz targets. Under libFuzzer (`make fuzz`: feature libfuzzer, coverage compiled in) the target is named by
//! AKV_FUZZ_TARGET, the arguments are libFuzzer's. Without it every target gets inputs that are drawn at random, from a
//! seed, for some seconds: no coverage guides them, so that any compiler will do.
//!
//!     fuzz [--seconds N] [--seed N] [--json PATH] [FILE...]
//!
//! With files, these are the inputs: what libFuzzer has found, or what once went wrong (tests/reliability/corpus).

#![cfg_attr(feature = "libfuzzer", no_main)]

#[cfg(feature = "libfuzzer")]
libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    use std::sync::OnceLock;
    static TARGET: OnceLock<fn(&[u8])> = OnceLock::new();
    let target = TARGET.get_or_init(|| {
        let name = std::env::var("AKV_FUZZ_TARGET").expect("AKV_FUZZ_TARGET names the target");
        let all = alignedkv_reliability::fuzz::TARGETS;
        all.iter().find(|t| t.0 == name).unwrap_or_else(|| panic!("no target {name}")).1
    });
    target(data);
});

#[cfg(not(feature = "libfuzzer"))]
fn main() -> std::process::ExitCode {
    alone::main()
}

#[cfg(not(feature = "libfuzzer"))]
mod alone {
    use alignedkv_reliability::dice::Dice;
    use alignedkv_reliability::fuzz::TARGETS;
    use serde_json::json;
    use std::process::ExitCode;
    use std::time::Instant;

    /// Random bytes, of which many are small: choices are.
    fn draw(dice: &mut Dice) -> Vec<u8> {
        let most = 4 << dice.below(9);
        let n = dice.below(most);
        let small = dice.below(4);
        (0..n).map(|_| if dice.below(4) < small { dice.below(8) as u8 } else { dice.bits() as u8 }).collect()
    }

    pub fn main() -> ExitCode {
        let (mut seconds, mut seed, mut json, mut files) = (3.0, 1u64, None, Vec::new());
        let mut rest = std::env::args().skip(1);
        while let Some(argument) = rest.next() {
            match argument.as_str() {
                "--seconds" => seconds = rest.next().and_then(|v| v.parse().ok()).unwrap_or(seconds),
                "--seed" => seed = rest.next().and_then(|v| v.parse().ok()).unwrap_or(seed),
                "--json" => json = rest.next(),
                _ => files.push(argument),
            }
        }
        let mut table = serde_json::Map::new();
        for (name, target) in TARGETS {
            for file in files.iter().filter(|f| f.contains(name)) {
                match std::fs::read(file) {
                    Ok(bytes) => target(&bytes),
                    Err(error) => {
                        eprintln!("fuzz: {file}: {error}");
                        return ExitCode::from(2);
                    }
                }
            }
            let (start, mut inputs, mut dice) = (Instant::now(), 0u64, Dice::Seeded(seed));
            while files.is_empty() && start.elapsed().as_secs_f64() < seconds / TARGETS.len() as f64 {
                let input = draw(&mut dice);
                // A crash tells what it was.
                let result = std::panic::catch_unwind(|| target(&input));
                if result.is_err() {
                    let path = format!("fuzz-{name}-{seed}-{inputs}");
                    let _ = std::fs::write(&path, &input);
                    eprintln!("fuzz: {name}: input {inputs} of seed {seed} is in {path}");
                    return ExitCode::from(1);
                }
                inputs += 1;
            }
            table.insert(name.to_owned(), json!(inputs));
        }
        let report = json!({ "program": "fuzz", "guided": false, "seed": seed, "fuzz_inputs": table, "findings": 0 });
        println!("{report:#}");
        if let Some(path) = json
            && let Err(error) = std::fs::write(&path, format!("{report:#}\n"))
        {
            eprintln!("fuzz: {path}: {error}");
            return ExitCode::from(2);
        }
        ExitCode::SUCCESS
    }
}
