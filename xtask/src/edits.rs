//! Copies of the checkout in which some places read otherwise.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, ensure};
use serde::Deserialize;

use crate::cache;

/// One such place.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Edit {
    /// What is made of it, in a few words.
    pub(crate) what: String,
    /// Where, from the checkout's root.
    pub(crate) file: PathBuf,
    /// What stands there, exactly once.
    pub(crate) find: String,
    /// What stands there then.
    pub(crate) replace: String,
}

impl Edit {
    fn apply(&self, text: &str) -> anyhow::Result<String> {
        let places = text.matches(&self.find).count();
        ensure!(
            places == 1,
            "{}: what it replaces stands {places} times in {}; bring it up to date",
            self.what,
            self.file.display()
        );
        Ok(text.replacen(&self.find, &self.replace, 1))
    }
}

/// The files of the checkout that edits are for, as these make them.
pub(crate) fn edited(edits: &[Edit]) -> anyhow::Result<BTreeMap<PathBuf, String>> {
    let mut files: BTreeMap<PathBuf, String> = BTreeMap::new();
    for edit in edits {
        let path = cache::checkout().join(&edit.file);
        let text = match files.get(&edit.file) {
            Some(text) => text.clone(),
            None => fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?,
        };
        files.insert(edit.file.clone(), edit.apply(&text)?);
    }
    Ok(files)
}

/// Copies what git knows of the checkout, with the edited files, writing only what differs, so that builds go on where they
/// stopped.
pub(crate) fn copy(tree: &Path, mut edited: BTreeMap<PathBuf, String>) -> anyhow::Result<()> {
    let listed = Command::new("git").args(["ls-files", "-z"]).current_dir(cache::checkout()).output()?;
    ensure!(listed.status.success(), "`git ls-files` failed; only a git checkout can be copied");
    for name in String::from_utf8(listed.stdout)?.split('\0').filter(|name| !name.is_empty()) {
        let (from, to) = (cache::checkout().join(name), tree.join(name));
        let content = match edited.remove(Path::new(name)) {
            Some(text) => text.into_bytes(),
            None => match fs::read(&from) {
                Ok(content) => content,
                // Deleted, and not committed yet.
                Err(_) => continue,
            },
        };
        if fs::read(&to).ok().as_ref() != Some(&content) {
            fs::create_dir_all(to.parent().unwrap_or(tree))?;
            fs::write(&to, content)?;
        }
    }
    Ok(())
}
