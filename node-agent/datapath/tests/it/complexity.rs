//! How much work the kernel's verifier has with each program. Kernels refuse a program beyond a million instructions, and
//! every path that is added multiplies those behind it: so growth is recorded, never silent.

use std::{collections::BTreeMap, fmt::Write as _, fs, path::Path};

use aya::programs::ProgramInfo;
use basal_datapath::state::Symbol;

use crate::{bench::Bench, harness::sandbox};

/// The recorded counts, a program a line.
const RECORD: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/verified-instructions.txt");
/// Growth that needs no new record, in percent: kernels count a little differently.
const TOLERANCE: u32 = 5;

fn recorded() -> BTreeMap<String, u32> {
    let text = fs::read_to_string(RECORD).unwrap_or_default();
    let lines = text.lines().filter_map(|line| line.split_once(' '));
    lines.map(|(program, count)| (program.to_owned(), count.trim().parse().unwrap())).collect()
}

/// Instructions that the verifier looked at, all paths together. Without legacy routing no path is dead.
fn counts(bpffs: &Path) -> BTreeMap<String, u32> {
    let bench = Bench::masquerading(bpffs);
    let count =
        |symbol: Symbol| ProgramInfo::from_pin(bench.pin(symbol)).unwrap().verified_instruction_count().unwrap();
    Symbol::ALL.into_iter().map(|symbol| (symbol.as_str().to_owned(), count(symbol))).collect()
}

#[test]
fn no_program_grows_silently() {
    sandbox(|bpffs| {
        let counts = counts(bpffs);
        if std::env::var_os("RECORD").is_some() {
            let mut text = String::new();
            counts.iter().for_each(|(program, count)| writeln!(text, "{program:<20} {count}").unwrap());
            fs::write(RECORD, text).unwrap();
        }
        let recorded = recorded();
        let names = |counts: &BTreeMap<String, u32>| counts.keys().cloned().collect::<Vec<_>>();
        assert_eq!(names(&counts), names(&recorded));
        for (program, count) in counts {
            let before = recorded[&program];
            assert!(
                count * 100 <= before * (100 + TOLERANCE),
                "{program} has {count} instructions for the verifier, {before} before. If that is meant:\n\
                 RECORD=1 cargo test -p basal-datapath --test it complexity"
            );
        }
    });
}
