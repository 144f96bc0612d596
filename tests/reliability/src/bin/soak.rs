//! The soak: random traffic over one kind of cache after another, by one thread and by many, until the time is over. The
//! work is done in a child process, so that its end by a crash is counted, too. With --operations, one round over each kind
//! of cache, of so many calls of each thread.
//!
//!     soak [--seconds N | --operations N] [--threads N] [--sequences N] [--seed N] [--plant FAULT] [--json PATH]

use alignedkv_reliability::barrier::{Barrier, together};
use alignedkv_reliability::counts::{Counts, add, found};
use alignedkv_reliability::dice::Dice;
use alignedkv_reliability::memory::{Heap, Hooks, resident_mib};
use alignedkv_reliability::model::{KINDS, Setup};
use alignedkv_reliability::traffic::{Plan, Plant, run, within};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader};
use std::process::{Command, ExitCode, Stdio};
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

struct Options {
    seconds: f64,
    operations: u64,
    threads: usize,
    sequences: usize,
    seed: u64,
    plant: Plant,
    json: Option<String>,
    worker: bool,
}

fn options(arguments: &[String]) -> Result<Options, String> {
    let mut o = Options {
        seconds: 10.0,
        operations: 0,
        threads: 8,
        sequences: 1000,
        seed: 1,
        plant: Plant::Nothing,
        json: None,
        worker: false,
    };
    let mut rest = arguments.iter();
    while let Some(name) = rest.next() {
        if name == "--worker" {
            o.worker = true;
            continue;
        }
        let value = rest.next().ok_or_else(|| format!("{name}: a value is missing"))?;
        let bad = |e: &dyn std::fmt::Display| format!("{name} {value}: {e}");
        match name.as_str() {
            "--seconds" => o.seconds = value.parse().map_err(|e| bad(&e))?,
            "--operations" => o.operations = value.parse().map_err(|e| bad(&e))?,
            "--threads" => o.threads = value.parse().map_err(|e| bad(&e))?,
            "--sequences" => o.sequences = value.parse().map_err(|e| bad(&e))?,
            "--seed" => o.seed = value.parse().map_err(|e| bad(&e))?,
            "--json" => o.json = Some(value.clone()),
            "--plant" => {
                let found = Plant::ALL.iter().find(|(name, _)| name == value);
                o.plant = found.ok_or_else(|| bad(&"no such fault"))?.1;
            }
            _ => return Err(format!("{name}: no such option")),
        }
    }
    Ok(o)
}

/// One kind of cache by one thread, then by many; then the next kind.
const CYCLE: usize = 2 * KINDS;

fn worker(o: &Options) -> ExitCode {
    let hooks: &'static Hooks = Box::leak(Box::default());
    let counts = Counts::default();
    let by_time = o.operations == 0;
    let end = within(if by_time { o.seconds } else { 3600.0 });
    // Long enough for sequences to come and go, short enough for every kind to have its turn.
    let round = (o.seconds / CYCLE as f64).clamp(0.2, 10.0);
    let plan = |i: usize, seconds: f64| Plan {
        threads: if i.is_multiple_of(2) { 1 } else { o.threads },
        seed: o.seed.wrapping_mul(1_000_003).wrapping_add(i as u64),
        until: if by_time { within(seconds).min(end) } else { end },
        operations: o.operations,
        fail_one_in: [0, 150, 30][i / 2 % 3],
        check_one_in: 3,
        plant: o.plant,
    };
    // What is allocated once and stays, in the library and here, is there after a first round.
    let all = Barrier::new(16 * o.threads);
    together(16 * o.threads, |_| all.wait()); // tables of waiting threads, above all
    let warm = Counts::default();
    for i in 0..2 {
        let setup = Setup::kind(0, 50, 300);
        run(&setup, &Plan { plant: Plant::Nothing, ..plan(i, 0.1) }, Dice::Seeded(o.seed), hooks, &warm);
    }
    let mut resident = Vec::new();
    let mut i = 0;
    while if by_time { Instant::now() < end } else { i < CYCLE } {
        let setup = Setup { n_threads: [0, 3][i / KINDS % 2], ..Setup::kind(i / 2, o.sequences, 600) };
        let (plan, blocks) = (plan(i, round), Heap::blocks());
        run(&setup, &plan, Dice::Seeded(plan.seed), hooks, &counts);
        let left = Heap::blocks() - blocks;
        add(&counts.leaks_checked, 1);
        if left != 0 {
            found(&counts.leaks, left.unsigned_abs(), || format!("{left} heap blocks are left of round {i}"));
        }
        resident.push(resident_mib());
        i += 1;
        // Of the first and of the last cycle: what the process holds while it has no cache.
        let most = |r: &[f64]| r.iter().copied().fold(0.0, f64::max);
        let (first, last) = (most(&resident[..i.min(CYCLE)]), most(&resident[i - i.min(CYCLE)..]));
        println!("{}", json!({ "rounds": i, "resident_mib": [first, last], "counts": counts.json() }));
    }
    ExitCode::from(u8::from(counts.findings() > 0))
}

/// How ThreadSanitizer ends a process that it has found one in.
const DATA_RACE: i32 = 66;

/// Runs the worker, and again if it crashed, until the time is over.
fn supervise(o: &Options, arguments: &[String]) -> Result<Value, String> {
    let (counts, start) = (Counts::default(), Instant::now());
    let (mut rounds, mut resident) = (0, json!([0, 0]));
    let (mut seed, mut data_races) = (o.seed, 0);
    loop {
        let left = o.seconds - start.elapsed().as_secs_f64();
        if left < 0.3 || counts.crashes.load(Relaxed) + data_races >= 3 {
            break;
        }
        let mut command = Command::new(std::env::current_exe().map_err(|e| e.to_string())?);
        command.args(arguments).args(["--seed", &seed.to_string(), "--seconds", &left.to_string(), "--worker"]);
        let mut child = command.stdout(Stdio::piped()).spawn().map_err(|e| e.to_string())?;
        let (pid, stop) = (child.id(), std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false)));
        // A hang is a crash that takes longer.
        let (watched, limit) = (stop.clone(), within(2.0 * left + if o.operations > 0 { 600.0 } else { 60.0 }));
        let watch = std::thread::spawn(move || {
            while !watched.load(Relaxed) {
                if Instant::now() > limit {
                    eprintln!("the worker hangs");
                    // SAFETY: our child, which has not been waited for.
                    unsafe { libc::kill(pid as i32, libc::SIGKILL) };
                    return;
                }
                std::thread::sleep(Duration::from_millis(20));
            }
        });
        let mut last = json!(null);
        for line in BufReader::new(child.stdout.take().ok_or("no stdout")?).lines().map_while(Result::ok) {
            last = serde_json::from_str(&line).map_err(|e| format!("{line}: {e}"))?;
        }
        let status = child.wait().map_err(|e| e.to_string())?;
        stop.store(true, Relaxed);
        let _ = watch.join();
        counts.add(&last["counts"]);
        rounds += last["rounds"].as_u64().unwrap_or(0);
        if last["rounds"].as_u64().unwrap_or(0) > 0 {
            resident = last["resident_mib"].clone();
        }
        if status.code() == Some(DATA_RACE) {
            data_races += 1;
        } else if !matches!(status.code(), Some(0 | 1)) {
            found(&counts.crashes, 1, || format!("the worker ended with {status}"));
        }
        seed = seed.wrapping_add(77);
        if o.operations > 0 {
            break;
        }
    }
    let minutes = start.elapsed().as_secs_f64() / 60.0;
    // Memory is flat: what is left after a round does not depend on how many there were.
    let at = |i: usize| resident[i].as_f64().unwrap_or(0.0);
    if rounds as usize >= 2 * CYCLE {
        add(&counts.leaks_checked, 1);
        if at(1) > 1.2 * at(0) + 16.0 {
            found(&counts.leaks, 1, || format!("{} MiB resident at first, {} at last", at(0), at(1)));
        }
    }
    Ok(json!({
        "program": "soak", "soak_minutes": (minutes * 100.0).round() / 100.0, "threads": o.threads,
        "sequences": o.sequences, "rounds": rounds, "resident_mib_first": at(0).round(), "resident_mib_last": at(1).round(),
        "counts": counts.json(), "data_races": data_races, "findings": counts.findings() + data_races,
    }))
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let options = match options(&arguments) {
        Ok(options) => options,
        Err(error) => {
            eprintln!("soak: {error}");
            return ExitCode::from(2);
        }
    };
    if options.worker {
        return worker(&options);
    }
    match supervise(&options, &arguments) {
        Ok(report) => {
            println!("{report:#}");
            if let Some(path) = &options.json
                && let Err(error) = std::fs::write(path, format!("{report:#}\n"))
            {
                eprintln!("soak: {path}: {error}");
                return ExitCode::from(2);
            }
            ExitCode::from(u8::from(report["findings"] != 0))
        }
        Err(error) => {
            eprintln!("soak: {error}");
            ExitCode::from(2)
        }
    }
}
