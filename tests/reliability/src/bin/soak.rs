use alignedkv_reliability::counts::Counts;
use alignedkv_reliability::dice::Dice;
use alignedkv_reliability::memory::Hooks;
use alignedkv_reliability::model::Setup;
use alignedkv_reliability::traffic::*;
fn main() {
    let hooks: &'static Hooks = Box::leak(Box::default());
    let counts = Counts::default();
    for i in 0..12 {
        let setup = Setup::kind(i, 100, 600);
        let plan = Plan {
            threads: if i < 6 { 1 } else { 8 },
            seed: i as u64,
            until: within(2.0),
            operations: 0,
            fail_one_in: if i % 2 == 0 { 100 } else { 0 },
            check_one_in: 4,
            plant: Plant::Nothing,
        };
        run(&setup, &plan, Dice::Seeded(i as u64), hooks, &counts);
        println!("{} {}", setup.name, counts.json());
    }
}
