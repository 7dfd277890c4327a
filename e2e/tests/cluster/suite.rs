//! What scenarios share.

use libtest_mimic::Failed;

/// A scenario's result, as the test runner wants it.
pub(crate) fn outcome(result: anyhow::Result<()>) -> Result<(), Failed> {
    result.map_err(|error| format!("{error:#}").into())
}
