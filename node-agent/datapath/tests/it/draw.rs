//! Packets drawn at random.

use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};

/// Draws packets: always the same, unless `PACKETS` and `SEED` in the environment ask for more or for others.
pub(crate) fn draw(packets: u32) -> Config {
    let packets = number("PACKETS").and_then(|packets| u32::try_from(packets).ok()).unwrap_or(packets);
    Config { cases: packets, failure_persistence: None, ..Config::default() }
}

/// Takes packets as they are drawn, in each round others.
pub(crate) fn runner(config: Config, round: u32) -> TestRunner {
    let seed = number("SEED").unwrap_or_default() + u64::from(round);
    let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &seed.to_le_bytes().repeat(4));
    TestRunner::new_with_rng(config, rng)
}

fn number(variable: &str) -> Option<u64> {
    let text = std::env::var(variable).ok().filter(|text| !text.is_empty())?;
    Some(text.parse().unwrap_or_else(|_| panic!("{variable} is no number: {text}")))
}
