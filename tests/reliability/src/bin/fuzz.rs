//! The fuzz targets. Built with the feature libfuzzer and coverage (`make fuzz`) this is a libFuzzer program, whose target
//! AKV_FUZZ_TARGET names. Built plainly it draws inputs at random, without coverage to guide them, so that any compiler will
//! do; or it drives such a libFuzzer program, target after target.
//!
//!     fuzz [--seconds N] [--seed N] [--target NAME] [--guided PROGRAM] [--corpus DIR] [--json PATH]
//!
//! Inputs in DIR/<target> come first, and libFuzzer adds to them.

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
    use alignedkv_reliability::fuzz::{TARGETS, Target};
    use serde_json::{Value, json};
    use std::path::{Path, PathBuf};
    use std::process::{Command, ExitCode};
    use std::time::Instant;

    /// Where inputs go that something went wrong with.
    const FOUND: &str = "build/reliability";

    struct Options {
        seconds: f64,
        seed: u64,
        target: Option<String>,
        guided: Option<String>,
        corpus: PathBuf,
        json: Option<String>,
    }

    fn options() -> Result<Options, String> {
        let mut o = Options {
            seconds: 3.0,
            seed: 1,
            target: None,
            guided: None,
            corpus: "tests/reliability/corpus".into(),
            json: None,
        };
        let mut rest = std::env::args().skip(1);
        while let Some(name) = rest.next() {
            let value = rest.next().ok_or_else(|| format!("{name}: a value is missing"))?;
            match name.as_str() {
                "--seconds" => o.seconds = value.parse().map_err(|e| format!("{name} {value}: {e}"))?,
                "--seed" => o.seed = value.parse().map_err(|e| format!("{name} {value}: {e}"))?,
                "--target" => o.target = Some(value),
                "--guided" => o.guided = Some(value),
                "--corpus" => o.corpus = value.into(),
                "--json" => o.json = Some(value),
                _ => return Err(format!("{name}: no such option")),
            }
        }
        Ok(o)
    }

    /// Random bytes, of which many are small: choices are.
    fn draw(dice: &mut Dice) -> Vec<u8> {
        let most = 4 << dice.below(9);
        let n = dice.below(most);
        let small = dice.below(4);
        (0..n).map(|_| if dice.below(4) < small { dice.below(8) as u8 } else { dice.bits() as u8 }).collect()
    }

    fn cpu_seconds(who: i32) -> f64 {
        // SAFETY: plain data, which the call fills.
        let usage = unsafe {
            let mut usage = std::mem::zeroed::<libc::rusage>();
            libc::getrusage(who, &mut usage);
            usage
        };
        let seconds = |t: libc::timeval| t.tv_sec as f64 + t.tv_usec as f64 * 1e-6;
        seconds(usage.ru_utime) + seconds(usage.ru_stime)
    }

    fn files(folder: &Path) -> Vec<PathBuf> {
        let mut all: Vec<_> = std::fs::read_dir(folder).into_iter().flatten().flatten().map(|e| e.path()).collect();
        all.sort();
        all
    }

    /// The corpus, then whatever comes. What went wrong is put into a file.
    fn random(o: &Options, (name, target): Target, seconds: f64) -> Value {
        let (start, mut inputs, mut findings, mut dice) = (Instant::now(), 0u64, 0, Dice::Seeded(o.seed));
        let _ = std::fs::create_dir_all(FOUND);
        let last = format!("{FOUND}/fuzz-{name}-last");
        let mut known = files(&o.corpus.join(name)).into_iter().filter_map(|f| std::fs::read(f).ok());
        while findings == 0 {
            let input = match known.next() {
                Some(input) => input,
                None if start.elapsed().as_secs_f64() < seconds => draw(&mut dice),
                None => break,
            };
            inputs += 1;
            // Whatever happens to this process.
            let _ = std::fs::write(&last, &input);
            if std::panic::catch_unwind(|| target(&input)).is_err() {
                let path = format!("{FOUND}/fuzz-{name}-{}-{inputs}", o.seed);
                let _ = std::fs::write(&path, &input);
                eprintln!("fuzz: {name}: what went wrong is in {path}");
                findings += 1;
            }
        }
        json!({ "inputs": inputs, "findings": findings })
    }

    /// libFuzzer, with its statistics.
    fn guided(o: &Options, program: &str, (name, _): Target, seconds: f64) -> Result<Value, String> {
        let own = o.corpus.join(name);
        std::fs::create_dir_all(&own).map_err(|e| e.to_string())?;
        let before = cpu_seconds(libc::RUSAGE_CHILDREN);
        let mut command = Command::new(program);
        command.env("AKV_FUZZ_TARGET", name).env("ASAN_OPTIONS", "allocator_may_return_null=1:detect_leaks=0");
        command.arg(format!("-max_total_time={}", seconds as u64)).arg(format!("-seed={}", o.seed));
        command.args(["-print_final_stats=1", "-max_len=2048", "-timeout=60", "-rss_limit_mb=4096"]);
        std::fs::create_dir_all(FOUND).map_err(|e| format!("{FOUND}: {e}"))?;
        command.arg(format!("-artifact_prefix={FOUND}/fuzz-{name}-")).arg(&own);
        let output = command.output().map_err(|e| format!("{program}: {e}"))?;
        let text = String::from_utf8_lossy(&output.stderr);
        let number = |line: &str| line.split_whitespace().filter_map(|w| w.parse::<u64>().ok()).next();
        let executed = text.lines().find(|l| l.starts_with("stat::number_of_executed_units")).and_then(number);
        let covered = text.lines().rev().find_map(|l| number(l.split_once("cov: ")?.1)).unwrap_or(0);
        if !output.status.success() {
            eprintln!("fuzz: {name}: {}", text.lines().rev().take(60).collect::<Vec<_>>().join("\n"));
        }
        let cpu = cpu_seconds(libc::RUSAGE_CHILDREN) - before;
        Ok(json!({
            "inputs": executed.unwrap_or(0), "findings": u64::from(!output.status.success()), "edges_covered": covered,
            "kept_inputs": files(&own).len(), "cpu_minutes": (cpu / 6.0).round() / 10.0,
        }))
    }

    pub fn main() -> ExitCode {
        let run = || -> Result<Value, String> {
            let o = options()?;
            let mut table = serde_json::Map::new();
            let targets: Vec<_> =
                TARGETS.iter().filter(|t| o.target.as_deref().is_none_or(|name| name == t.0)).collect();
            for &&target in &targets {
                let seconds = o.seconds / targets.len() as f64;
                let result = match &o.guided {
                    Some(program) => guided(&o, program, target, seconds)?,
                    None => random(&o, target, seconds),
                };
                table.insert(target.0.to_owned(), result);
            }
            let sum = |field: &str| table.values().filter_map(|t| t[field].as_u64()).sum::<u64>();
            let report = json!({
                "program": "fuzz", "guided": o.guided.is_some(), "seed": o.seed, "fuzz_inputs": sum("inputs"),
                "findings": sum("findings"), "targets": table,
            });
            println!("{report:#}");
            if let Some(path) = o.json {
                std::fs::write(&path, format!("{report:#}\n")).map_err(|e| format!("{path}: {e}"))?;
            }
            Ok(report)
        };
        match run() {
            Ok(report) => ExitCode::from(u8::from(report["findings"] != 0)),
            Err(error) => {
                eprintln!("fuzz: {error}");
                ExitCode::from(2)
            }
        }
    }
}
