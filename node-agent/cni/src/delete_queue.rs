//! Where a DEL waits while the agent is away: one file for each, in a folder that plugin and agent share.
//!
//! Nothing is lost between the two because of a lock file (flock): a plugin holds it shared while it looks for the
//! agent once more and writes its file; the agent holds it alone while it carries out the files and begins to listen.
//! The number of files is bounded; beyond that the runtime has to try again. The folder and the bound are Cilium's.

use std::{
    fs::{self, File, OpenOptions, TryLockError},
    io::{self, Write as _},
    path::{Path, PathBuf},
    time::Duration,
};

use crate::{
    api::{DelRequest, sha256_hex},
    client::Deadline,
};

/// At most so many files wait.
pub const MAX_FILES: usize = 256;

const LOCK_FILE: &str = "lockfile";
const SUFFIX: &str = "delete";
const LOCK_PAUSE: Duration = Duration::from_millis(20);

/// Why a DEL could not be queued or read.
#[derive(Debug, thiserror::Error)]
pub enum QueueError {
    /// The file system failed.
    #[error("delete queue {path}: {source}")]
    Io {
        /// The folder or file.
        path: PathBuf,
        /// What it said.
        source: io::Error,
    },
    /// Another process held the lock until the deadline.
    #[error("delete queue {0}: the agent is carrying out what waits there")]
    Locked(PathBuf),
    /// [`MAX_FILES`] wait already.
    #[error("delete queue {0}: {MAX_FILES} deletes wait for the agent already")]
    Full(PathBuf),
}

fn io_error(path: &Path) -> impl FnOnce(io::Error) -> QueueError {
    let path = path.to_owned();
    move |source| QueueError::Io { path, source }
}

fn open_lock(folder: &Path) -> Result<File, QueueError> {
    fs::create_dir_all(folder).map_err(io_error(folder))?;
    let path = folder.join(LOCK_FILE);
    OpenOptions::new().create(true).truncate(false).write(true).open(&path).map_err(io_error(&path))
}

/// The plugin's side: the shared lock.
#[derive(Debug)]
pub struct Producer {
    folder: PathBuf,
    // Held until it is dropped.
    _lock: File,
}

impl Producer {
    /// Takes the lock, as soon as no agent holds it.
    ///
    /// # Errors
    /// See [`QueueError`].
    pub fn lock(folder: &Path, deadline: Deadline) -> Result<Self, QueueError> {
        let lock = open_lock(folder)?;
        loop {
            match lock.try_lock_shared() {
                Ok(()) => return Ok(Self { folder: folder.to_owned(), _lock: lock }),
                Err(TryLockError::Error(error)) => return Err(io_error(folder)(error)),
                Err(TryLockError::WouldBlock) if deadline.left().is_none() => {
                    return Err(QueueError::Locked(folder.to_owned()));
                }
                Err(TryLockError::WouldBlock) => deadline.pause(LOCK_PAUSE),
            }
        }
    }

    /// Queues a DEL. The same one again takes no further place.
    ///
    /// # Errors
    /// See [`QueueError`].
    pub fn push(&self, request: &DelRequest) -> Result<(), QueueError> {
        let name = sha256_hex(request.attachment.to_string().as_bytes());
        let path = self.folder.join(format!("{name}.{SUFFIX}"));
        if !path.exists() && waiting(&self.folder)?.len() >= MAX_FILES {
            return Err(QueueError::Full(self.folder.clone()));
        }
        // The name says who wrote it, so that two plugins do not write into one file.
        let draft = self.folder.join(format!("{name}.{}.tmp", std::process::id()));
        let body = serde_json::to_vec(request).map_err(io::Error::from).map_err(io_error(&draft))?;
        let mut file = File::create(&draft).map_err(io_error(&draft))?;
        file.write_all(&body).and_then(|()| file.sync_all()).map_err(io_error(&draft))?;
        fs::rename(&draft, &path).map_err(io_error(&path))?;
        File::open(&self.folder).and_then(|folder| folder.sync_all()).map_err(io_error(&self.folder))
    }
}

fn waiting(folder: &Path) -> Result<Vec<PathBuf>, QueueError> {
    let mut paths = Vec::new();
    for entry in fs::read_dir(folder).map_err(io_error(folder))? {
        let path = entry.map_err(io_error(folder))?.path();
        if path.extension().is_some_and(|extension| extension == SUFFIX) {
            paths.push(path);
        }
    }
    paths.sort();
    Ok(paths)
}

/// One waiting DEL.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Queued {
    /// The file.
    pub path: PathBuf,
    /// What it asks for, or why that cannot be read.
    pub request: Result<DelRequest, String>,
}

/// The agent's side: the exclusive lock. The agent listens on its socket before it drops this.
#[derive(Debug)]
pub struct Consumer {
    folder: PathBuf,
    // Held until it is dropped.
    _lock: File,
}

impl Consumer {
    /// Takes the lock; waits for plugins that hold it. Blocking.
    ///
    /// # Errors
    /// `Io`.
    pub fn lock(folder: &Path) -> Result<Self, QueueError> {
        let lock = open_lock(folder)?;
        lock.lock().map_err(io_error(folder))?;
        Ok(Self { folder: folder.to_owned(), _lock: lock })
    }

    /// What waits.
    ///
    /// # Errors
    /// `Io`, when the folder cannot be read. A file that cannot be read is reported in its place.
    pub fn waiting(&self) -> Result<Vec<Queued>, QueueError> {
        let read = |path: &Path| -> Result<DelRequest, String> {
            let body = fs::read(path).map_err(|error| error.to_string())?;
            serde_json::from_slice(&body).map_err(|error| error.to_string())
        };
        Ok(waiting(&self.folder)?.into_iter().map(|path| Queued { request: read(&path), path }).collect())
    }

    /// Forgets one that was carried out, or that cannot be read.
    ///
    /// # Errors
    /// `Io`.
    pub fn remove(&self, queued: &Queued) -> Result<(), QueueError> {
        match fs::remove_file(&queued.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(io_error(&queued.path)(error)),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::Attachment;

    fn request(id: usize) -> DelRequest {
        DelRequest { attachment: Attachment { container_id: format!("c{id}"), ifname: "eth0".into() } }
    }

    fn soon() -> Deadline {
        Deadline::after(Duration::from_millis(50))
    }

    #[test]
    fn what_is_pushed_is_found_once_and_can_be_removed() {
        let folder = tempfile::tempdir().unwrap();
        let queue = folder.path().join("deleteQueue");
        let producer = Producer::lock(&queue, soon()).unwrap();
        producer.push(&request(1)).unwrap();
        producer.push(&request(1)).unwrap();
        producer.push(&request(2)).unwrap();
        drop(producer);
        fs::write(queue.join("x.delete"), "{").unwrap();

        let consumer = Consumer::lock(&queue).unwrap();
        let all = consumer.waiting().unwrap();
        let readable: Vec<_> = all.iter().filter_map(|queued| queued.request.clone().ok()).collect();
        assert_eq!(all.len(), 3);
        assert_eq!(readable.len(), 2);
        for queued in &all {
            consumer.remove(queued).unwrap();
        }
        assert_eq!(consumer.waiting().unwrap(), []);
    }

    #[test]
    fn the_number_of_files_is_bounded() {
        let folder = tempfile::tempdir().unwrap();
        let producer = Producer::lock(folder.path(), soon()).unwrap();
        for id in 0..MAX_FILES {
            fs::write(folder.path().join(format!("{id}.{SUFFIX}")), "").unwrap();
        }
        assert!(matches!(producer.push(&request(0)), Err(QueueError::Full(_))));
    }

    #[test]
    fn nobody_pushes_while_the_agent_reads() {
        let folder = tempfile::tempdir().unwrap();
        let consumer = Consumer::lock(folder.path()).unwrap();
        assert!(matches!(Producer::lock(folder.path(), soon()), Err(QueueError::Locked(_))));
        drop(consumer);
        Producer::lock(folder.path(), soon()).unwrap();
    }
}
