//! What the command line, the environment and the folder say of each key, as text.

use std::{
    collections::BTreeMap,
    env,
    ffi::OsString,
    fs, io,
    path::{Path, PathBuf},
};

use clap::{ArgMatches, Command};

use super::{effective::Layer, given};

/// The prefix of environment variables.
const PREFIX: &str = "CILIUM_";

/// Where a process's configuration comes from, beside the folder.
#[derive(Debug, Clone, Default)]
pub struct Sources {
    /// The command line; the first is the program.
    pub arguments: Vec<OsString>,
    /// The environment.
    pub environment: BTreeMap<String, String>,
}

impl Sources {
    /// Those of this process. Variables that are no UTF-8 are left out.
    #[must_use]
    pub fn of_process() -> Self {
        let text = |(name, value): (OsString, OsString)| Some((name.into_string().ok()?, value.into_string().ok()?));
        Self { arguments: env::args_os().collect(), environment: env::vars_os().filter_map(text).collect() }
    }
}

/// The folder cannot be read.
#[derive(Debug, thiserror::Error)]
#[error("config-dir: cannot read {path}: {cause}")]
pub struct ReadError {
    path: PathBuf,
    #[source]
    cause: io::Error,
}

/// The texts of all layers but the defaults. Values are trimmed, and empty ones left out.
#[derive(Debug)]
pub(super) struct Layers {
    flags: BTreeMap<String, String>,
    environment: BTreeMap<String, String>,
    folder: BTreeMap<String, String>,
    folder_path: Option<PathBuf>,
}

impl Layers {
    /// Collects the layers. `flags` is what the command line alone says.
    pub(super) fn read(command: &Command, flags: &ArgMatches, sources: &Sources) -> Result<Self, ReadError> {
        let on_command_line = command.get_arguments().filter(|arg| given(flags, arg)).filter_map(|arg| {
            let values: Vec<_> =
                flags.get_raw(arg.get_id().as_str())?.map(|value| value.to_string_lossy().into_owned()).collect();
            Some((arg.get_long()?.to_owned(), values.join(",")))
        });
        let variables = sources.environment.iter().filter_map(|(name, value)| {
            let key = name.strip_prefix(PREFIX)?.to_ascii_lowercase().replace('_', "-");
            Some((key, value.trim().to_owned()))
        });
        let mut layers = Self {
            flags: on_command_line.collect(),
            environment: variables.filter(|(_, value)| !value.is_empty()).collect(),
            folder: BTreeMap::new(),
            folder_path: None,
        };
        if let Some((_, path)) = layers.origin("config-dir") {
            let path = PathBuf::from(path);
            layers.folder = read_folder(&path)?;
            layers.folder_path = Some(path);
        }
        Ok(layers)
    }

    /// The highest layer that has the key, with its text.
    pub(super) fn origin(&self, key: &str) -> Option<(Layer, &str)> {
        let layers =
            [(Layer::Flag, &self.flags), (Layer::Environment, &self.environment), (Layer::ConfigDir, &self.folder)];
        layers.into_iter().find_map(|(layer, texts)| Some((layer, texts.get(key)?.as_str())))
    }

    /// The text of the key, unless the command line has it.
    pub(super) fn below_flags(&self, key: &str) -> Option<&str> {
        self.origin(key).filter(|(layer, _)| *layer != Layer::Flag).map(|(_, value)| value)
    }

    /// Where exactly a layer has a key.
    pub(super) fn place(&self, layer: Layer, key: &str) -> String {
        match (layer, &self.folder_path) {
            (Layer::Environment, _) => format!("variable {PREFIX}{}", key.to_ascii_uppercase().replace('-', "_")),
            (Layer::ConfigDir, Some(folder)) => format!("file {}", folder.join(key).display()),
            (layer, _) => layer.to_string(),
        }
    }

    /// Keys that the command does not have.
    pub(super) fn unknown(&self, command: &Command) -> Vec<String> {
        let known = |key: &&String| command.get_arguments().any(|arg| arg.get_long() == Some(key));
        let mut unknown: Vec<String> =
            self.environment.keys().chain(self.folder.keys()).filter(|key| !known(key)).cloned().collect();
        unknown.sort_unstable();
        unknown.dedup();
        unknown
    }
}

/// Reads the files of a folder. kubelet mounts a ConfigMap as links beside folders whose names begin with `..`; folders
/// are not keys.
fn read_folder(path: &Path) -> Result<BTreeMap<String, String>, ReadError> {
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |cause| ReadError { path, cause }
    };
    let mut values = BTreeMap::new();
    for entry in fs::read_dir(path).map_err(failed(path))? {
        let file = entry.map_err(failed(path))?.path();
        let Some(key) = file.file_name().and_then(|name| name.to_str()).filter(|name| !name.starts_with("..")) else {
            continue;
        };
        if fs::metadata(&file).map_err(failed(&file))?.is_dir() {
            continue;
        }
        let value = fs::read_to_string(&file).map_err(failed(&file))?.trim().to_owned();
        if !value.is_empty() {
            values.insert(key.to_owned(), value);
        }
    }
    Ok(values)
}
