//! Reading a prefix of any size, page by page, as of one revision.

use crate::kv::{Header, KeyValue, Keys, Kv, KvError, Range, Revision};

/// Keys in one page: Cilium's `etcd.limit`.
pub const PAGE_SIZE: i64 = 256;

/// All keys with a prefix, at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listed {
    /// That moment.
    pub header: Header,
    /// The keys, in ascending order of bytes.
    pub kvs: Vec<KeyValue>,
}

/// Reads all keys with a prefix, as of the revision of the first page.
///
/// # Errors
/// Those of [`Kv::range`]; `Compacted` when the listing took longer than etcd keeps history.
pub async fn list(kv: &dyn Kv, prefix: &str, page_size: i64, keys_only: bool) -> Result<Listed, KvError> {
    read(kv, prefix, Range { limit: page_size, keys_only, ..Range::prefix(prefix) }).await
}

/// Reads all keys with a prefix, as of a revision. The answer's header is the store's when it answered.
///
/// # Errors
/// Those of [`Kv::range`]; `Compacted` when etcd does not remember the revision.
pub async fn list_at(kv: &dyn Kv, prefix: &str, revision: Revision, page_size: i64) -> Result<Listed, KvError> {
    read(kv, prefix, Range { limit: page_size, revision, ..Range::prefix(prefix) }).await
}

async fn read(kv: &dyn Kv, prefix: &str, mut range: Range) -> Result<Listed, KvError> {
    let first = kv.range(range.clone()).await?;
    let header = first.header;
    let (mut kvs, mut more) = (first.kvs, first.more);
    while more {
        let Some(last) = kvs.last() else { break };
        range.keys = Keys::PrefixFrom { prefix: prefix.to_owned(), from: format!("{}\0", last.key) };
        if range.revision == 0 {
            range.revision = header.revision;
        }
        let page = kv.range(range.clone()).await?;
        if page.header.cluster_id != header.cluster_id {
            return Err(KvError::Unavailable("etcd was replaced during the listing".to_owned()));
        }
        more = page.more && !page.kvs.is_empty();
        kvs.extend(page.kvs);
    }
    Ok(Listed { header, kvs })
}
