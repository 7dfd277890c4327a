//! Every target with its corpus, and with mutations of it: the same ones in every run.
//!
//! What libFuzzer finds goes into the corpus, and so is tried here for ever.
#![expect(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on fails")]

use std::{fs, path::Path};

use basal_fuzz::{TARGETS, Target};
use proptest::{
    prelude::*,
    sample::{Index, select},
    test_runner::{Config, RngAlgorithm, TestRng, TestRunner},
};

/// Mutations of each target.
const INPUTS: u32 = 4000;

fn corpus(target: &Target) -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(target.name);
    let mut files: Vec<_> = fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    assert!(!files.is_empty(), "{} is empty", folder.display());
    files.iter().map(|file| fs::read(file).unwrap()).collect()
}

/// One change of an input.
#[derive(Debug, Clone)]
enum Edit {
    Set(Index, u8),
    Flip(Index, u8),
    Insert(Index, Vec<u8>),
    Remove(Index, usize),
    /// A part of the input once more, somewhere else.
    Repeat(Index, usize, Index),
    Cut(Index),
}

/// Words that mean something to some reader.
const WORDS: &[&str] = &[
    "\"",
    "{",
    "}",
    "[",
    "]",
    ":",
    ",",
    "null",
    "true",
    "-1",
    "0",
    "18446744073709551616",
    "1e400",
    "\\u0000",
    "\u{0}",
    "/",
    "/0",
    "/33",
    "/129",
    "::",
    "255.255.255.255",
    "10.0.0.0/24",
    "fd00::/120",
    "=",
    ";",
    "\n",
    "\n\n",
    "…",
    "\u{feff}",
];

fn edit() -> impl Strategy<Value = Edit> {
    let index = any::<Index>;
    prop_oneof![
        (index(), any::<u8>()).prop_map(|(at, to)| Edit::Set(at, to)),
        (index(), 0..8_u8).prop_map(|(at, bit)| Edit::Flip(at, bit)),
        (index(), select(WORDS)).prop_map(|(at, word)| Edit::Insert(at, word.into())),
        (index(), prop::collection::vec(any::<u8>(), 1..8)).prop_map(|(at, bytes)| Edit::Insert(at, bytes)),
        (index(), 1..16_usize).prop_map(|(at, len)| Edit::Remove(at, len)),
        (index(), 1..64_usize, index()).prop_map(|(from, len, to)| Edit::Repeat(from, len, to)),
        index().prop_map(Edit::Cut),
    ]
}

fn apply(input: &mut Vec<u8>, edit: &Edit) {
    let end = input.len();
    let place = |at: &Index| at.index(end + 1);
    match edit {
        Edit::Set(at, to) => {
            if let Some(byte) = input.get_mut(place(at)) {
                *byte = *to;
            }
        }
        Edit::Flip(at, bit) => {
            if let Some(byte) = input.get_mut(place(at)) {
                *byte ^= 1 << bit;
            }
        }
        Edit::Insert(at, bytes) => drop(input.splice(place(at)..place(at), bytes.iter().copied())),
        Edit::Remove(at, len) => drop(input.drain(place(at)..(place(at) + len).min(end))),
        Edit::Repeat(from, len, to) => {
            let part = input[place(from)..(place(from) + len).min(end)].to_vec();
            drop(input.splice(place(to)..place(to), part));
        }
        Edit::Cut(at) => input.truncate(place(at)),
    }
}

fn try_target(name: &str) {
    let target = TARGETS.iter().find(|target| target.name == name).unwrap();
    let corpus = corpus(target);
    for input in &corpus {
        (target.run)(input);
    }
    let config = Config { cases: INPUTS, failure_persistence: None, ..Config::default() };
    let mut runner = TestRunner::new_with_rng(config, TestRng::deterministic_rng(RngAlgorithm::ChaCha));
    let mutated = (select(corpus), prop::collection::vec(edit(), 1..6)).prop_map(|(mut input, edits)| {
        edits.iter().for_each(|edit| apply(&mut input, edit));
        input
    });
    let result = runner.run(&mutated, |input| {
        (target.run)(&input);
        Ok(())
    });
    if let Err(failure) = result {
        panic!("{name}: {failure}");
    }
}

macro_rules! targets {
    ($($test:ident: $name:literal),* $(,)?) => {
        $(#[test]
        fn $test() {
            try_target($name);
        })*

        #[test]
        fn every_target_has_a_test_and_a_binary() {
            let tested = [$($name),*];
            let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz_targets");
            for target in TARGETS {
                assert!(tested.contains(&target.name), "{} has no test", target.name);
                let binary = folder.join(format!("{}.rs", target.name));
                let text = fs::read_to_string(&binary).unwrap();
                assert!(text.contains(&format!("run({:?}", target.name)), "{}", binary.display());
            }
        }
    };
}

targets! {
    cni: "cni",
    frame: "frame",
    journal: "journal",
    keys: "keys",
    records: "records",
    cells: "cells",
    objects: "objects",
    config: "config",
    etcd_config: "etcd-config",
    labels: "labels",
}
