//! The journal as files: one for each endpoint, written as draft, synced, renamed, folder synced.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, Write as _},
    path::{Path, PathBuf},
};

use async_trait::async_trait;
use basal_runtime::outcome::Outcome;

use super::{Entry, Journal, JournalError, JournalKey, Unusable, codec};
use crate::endpoint::record::EndpointRecord;

const SUFFIX: &str = "endpoint";
const DRAFT_SUFFIX: &str = "draft";

/// A folder of records.
#[derive(Debug, Clone)]
pub struct FileJournal {
    folder: PathBuf,
}

impl FileJournal {
    /// The journal in a folder, which is made when it is missing.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn open(folder: &Path) -> Result<Self, JournalError> {
        fs::create_dir_all(folder).map_err(|error| failed(folder, &error))?;
        Ok(Self { folder: folder.to_owned() })
    }

    fn path(&self, key: &JournalKey) -> PathBuf {
        self.folder.join(format!("{key}.{SUFFIX}"))
    }

    fn sync_folder(&self) -> io::Result<()> {
        File::open(&self.folder)?.sync_all()
    }

    fn load_now(&self) -> Result<BTreeMap<JournalKey, Entry>, JournalError> {
        let mut entries = BTreeMap::new();
        for item in fs::read_dir(&self.folder).map_err(|error| failed(&self.folder, &error))? {
            let path = item.map_err(|error| failed(&self.folder, &error))?.path();
            if path.extension().is_some_and(|extension| extension == DRAFT_SUFFIX) {
                // A crash came before it was a record. It is in nobody's way.
                fs::remove_file(&path).unwrap_or_default();
                continue;
            }
            let is_record = path.extension().is_some_and(|extension| extension == SUFFIX);
            let (true, Some(stem)) = (is_record, path.file_stem().and_then(|stem| stem.to_str())) else { continue };
            let mut entry = fs::read(&path)
                .map_err(|error| Unusable::Unreadable(error.to_string()))
                .and_then(|text| codec::decode(&text));
            let key = JournalKey::found(stem);
            if entry.as_ref().is_ok_and(|record| JournalKey::of(&record.attachment) != key) {
                entry = Err(Unusable::Unreadable("it stands under the name of another endpoint".to_owned()));
            }
            entries.insert(key, entry);
        }
        Ok(entries)
    }

    fn put_now(&self, record: &EndpointRecord) -> Outcome<(), JournalError> {
        let path = self.path(&JournalKey::of(&record.attachment));
        let draft = path.with_extension(DRAFT_SUFFIX);
        let write = || -> io::Result<()> {
            let mut file = File::create(&draft)?;
            file.write_all(codec::encode(record)?.as_bytes())?;
            file.sync_all()?;
            fs::rename(&draft, &path)
        };
        if let Err(error) = write() {
            // On a full disk this is what takes the room. The next record of the same name writes over it otherwise.
            fs::remove_file(&draft).unwrap_or_default();
            return Outcome::Refused(failed(&path, &error));
        }
        self.settle(&path)
    }

    fn remove_now(&self, key: &JournalKey) -> Outcome<(), JournalError> {
        let path = self.path(key);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Outcome::Refused(failed(&path, &error)),
            _ => self.settle(&path),
        }
    }

    /// After a rename or a delete: whether it outlives a crash is known once the folder is synced.
    fn settle(&self, path: &Path) -> Outcome<(), JournalError> {
        match self.sync_folder() {
            Ok(()) => Outcome::Done(()),
            Err(error) => Outcome::Unknown(failed(path, &error).to_string()),
        }
    }

    async fn blocking<T: Send + 'static>(&self, work: impl FnOnce(&Self) -> T + Send + 'static) -> Result<T, String> {
        let journal = self.clone();
        tokio::task::spawn_blocking(move || work(&journal)).await.map_err(|error| error.to_string())
    }
}

fn failed(path: &Path, error: &io::Error) -> JournalError {
    JournalError { path: path.display().to_string(), why: error.to_string() }
}

#[async_trait]
impl Journal for FileJournal {
    async fn load(&self) -> Result<BTreeMap<JournalKey, Entry>, JournalError> {
        let folder = self.folder.display().to_string();
        self.blocking(Self::load_now).await.unwrap_or_else(|why| Err(JournalError { path: folder, why }))
    }

    async fn put(&self, record: &EndpointRecord) -> Outcome<(), JournalError> {
        let record = record.clone();
        self.blocking(move |journal| journal.put_now(&record)).await.unwrap_or_else(Outcome::Unknown)
    }

    async fn remove(&self, key: &JournalKey) -> Outcome<(), JournalError> {
        let key = key.clone();
        self.blocking(move |journal| journal.remove_now(&key)).await.unwrap_or_else(Outcome::Unknown)
    }
}
