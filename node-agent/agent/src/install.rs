//! What the agent puts on the node for the container runtime: the plugin's executable and its configuration. Both appear
//! as a whole or not at all; the configuration only once the agent can serve, because its presence makes the node ready.

use std::{
    fs::{self, File},
    io::{self, Write as _},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

use serde_json::json;

/// The plugin's name: that of its executable, and the `type` in the configuration.
pub const PLUGIN: &str = "basal-cni";
/// The plugin of the CNI project that serves hostPorts.
pub const PORTMAP: &str = "portmap";
/// What configurations of other plugins are renamed to, so that the runtime does not take them (Cilium's suffix).
const SET_ASIDE: &str = "cilium_bak";

/// Why something could not be installed.
#[derive(Debug, thiserror::Error)]
#[error("cannot install {path}: {source}; is the folder mounted from the host, and writable?")]
pub struct InstallError {
    path: PathBuf,
    source: io::Error,
}

fn failed(path: &Path) -> impl FnOnce(io::Error) -> InstallError {
    let path = path.to_owned();
    move |source| InstallError { path, source }
}

/// Writes a file as a whole: draft, sync, rename.
fn write(path: &Path, content: &[u8], mode: u32) -> Result<(), InstallError> {
    let draft = path.with_extension("basal-draft");
    let whole = || -> io::Result<()> {
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder)?;
        }
        let mut file = File::create(&draft)?;
        file.write_all(content)?;
        file.set_permissions(fs::Permissions::from_mode(mode))?;
        file.sync_all()?;
        fs::rename(&draft, path)
    };
    whole().map_err(failed(path))
}

/// Installs the executable, unless the same is there.
///
/// # Errors
/// See [`InstallError`].
pub fn binary(from: &Path, folder: &Path) -> Result<(), InstallError> {
    let content = fs::read(from).map_err(failed(from))?;
    let path = folder.join(PLUGIN);
    if fs::read(&path).is_ok_and(|found| found == content) {
        return Ok(());
    }
    write(&path, &content, 0o755)
}

/// The configuration's content. `portmap`, which serves hostPorts, comes with the runtime's own plugins; a configuration
/// that names a plugin which is not there would let no pod start.
#[must_use]
pub fn conflist(socket: &Path, delete_queue: &Path, portmap: bool) -> String {
    let ours =
        json!({"type": PLUGIN, "agent-socket": socket, "delete-queue": delete_queue, "capabilities": {"ips": true}});
    let mut plugins = vec![ours];
    if portmap {
        plugins.push(json!({"type": PORTMAP, "capabilities": {"portMappings": true}}));
    }
    let list = json!({"cniVersion": "1.0.0", "name": "cilium", "plugins": plugins});
    format!("{list:#}\n")
}

/// Installs the configuration, unless the same is there.
///
/// # Errors
/// See [`InstallError`].
pub fn configuration(path: &Path, content: &str) -> Result<(), InstallError> {
    if fs::read(path).is_ok_and(|found| found == content.as_bytes()) {
        return Ok(());
    }
    write(path, content.as_bytes(), 0o600)
}

/// Renames the configurations of other plugins beside ours (`cni-exclusive`). Answers those that were.
///
/// # Errors
/// See [`InstallError`].
pub fn set_others_aside(ours: &Path) -> Result<Vec<PathBuf>, InstallError> {
    let Some(folder) = ours.parent() else { return Ok(Vec::new()) };
    let mut renamed = Vec::new();
    for entry in fs::read_dir(folder).map_err(failed(folder))? {
        let path = entry.map_err(failed(folder))?.path();
        let is_configuration =
            path.extension().and_then(|e| e.to_str()).is_some_and(|e| matches!(e, "conf" | "conflist" | "json"));
        if is_configuration && path != ours {
            let mut aside = path.clone().into_os_string();
            aside.push(".");
            aside.push(SET_ASIDE);
            fs::rename(&path, &aside).map_err(failed(&path))?;
            renamed.push(path);
        }
    }
    Ok(renamed)
}

/// Takes the configuration away: the node stops being ready for new pods.
///
/// # Errors
/// See [`InstallError`].
pub fn withdraw(path: &Path) -> Result<(), InstallError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed(path)(error)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt as _;

    use super::*;

    #[test]
    fn the_executable_is_replaced_only_when_it_differs() {
        let folder = tempfile::tempdir().unwrap();
        let from = folder.path().join("new");
        let bin = folder.path().join("bin");
        fs::write(&from, "one").unwrap();
        binary(&from, &bin).unwrap();
        let meta = fs::metadata(bin.join(PLUGIN)).unwrap();
        assert_eq!(meta.mode() & 0o777, 0o755);
        binary(&from, &bin).unwrap();
        assert_eq!(fs::metadata(bin.join(PLUGIN)).unwrap().ino(), meta.ino());
        fs::write(&from, "two").unwrap();
        binary(&from, &bin).unwrap();
        assert_eq!(fs::read(bin.join(PLUGIN)).unwrap(), b"two");
        assert_eq!(fs::read_dir(&bin).unwrap().count(), 1, "no draft is left");
    }

    #[test]
    fn the_configuration_stands_alone_and_goes_again() {
        let folder = tempfile::tempdir().unwrap();
        let ours = folder.path().join("05-cilium.conflist");
        fs::write(folder.path().join("10-bridge.conflist"), "{}").unwrap();
        fs::write(folder.path().join("README"), "").unwrap();
        let content = conflist(Path::new("/s"), Path::new("/q"), true);
        configuration(&ours, &content).unwrap();
        assert_eq!(set_others_aside(&ours).unwrap(), [folder.path().join("10-bridge.conflist")]);
        let parsed: serde_json::Value = serde_json::from_slice(&fs::read(&ours).unwrap()).unwrap();
        assert_eq!((&parsed["plugins"][0]["type"], &parsed["plugins"][1]["type"]), (&json!(PLUGIN), &json!(PORTMAP)));
        assert!(!conflist(Path::new("/s"), Path::new("/q"), false).contains(PORTMAP));
        assert!(folder.path().join("10-bridge.conflist.cilium_bak").exists());
        withdraw(&ours).unwrap();
        withdraw(&ours).unwrap();
        assert!(!ours.exists());
    }
}
