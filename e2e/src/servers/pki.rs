//! A certificate authority in a folder.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, date_time_ymd,
};

use crate::wait;

/// A certificate authority whose files lie in one folder: `ca.crt`, `ca.key`, and NAME.crt, NAME.key for each
/// certificate that it issued. Keys are ECDSA P-256 in PKCS #8.
pub struct Pki {
    dir: PathBuf,
    issuer: Issuer<'static, KeyPair>,
}

/// The files of one certificate.
#[derive(Debug, Clone)]
pub struct CertFiles {
    /// The certificate, PEM.
    pub cert: PathBuf,
    /// Its private key, PEM.
    pub key: PathBuf,
    /// The certificate of the authority, PEM.
    pub ca: PathBuf,
}

/// What a certificate says. Every certificate serves for clients and servers alike.
#[derive(Debug, Clone)]
pub struct CertRequest {
    /// Name of the files, without extension.
    pub file: String,
    /// CN: etcd's user, Kubernetes' user.
    pub common_name: String,
    /// O: Kubernetes' groups.
    pub organisations: Vec<String>,
    /// Addresses and DNS names of a server.
    pub sans: Vec<String>,
    /// Valid from this long ago.
    pub age: Duration,
    /// Valid for this long, counted from its begin: less than `age` makes an expired certificate.
    pub lifetime: Duration,
}

impl CertRequest {
    /// A client certificate, valid from an hour ago for a day.
    #[must_use]
    pub fn client(common_name: &str) -> Self {
        Self {
            file: common_name.replace([':', '/'], "-"),
            common_name: common_name.to_owned(),
            organisations: Vec::new(),
            sans: Vec::new(),
            age: Duration::from_secs(3600),
            lifetime: Duration::from_secs(365 * 24 * 3600),
        }
    }

    /// A server certificate for these addresses and names, valid from an hour ago for a year.
    #[must_use]
    pub fn server<S: Into<String>>(common_name: &str, sans: impl IntoIterator<Item = S>) -> Self {
        Self { sans: sans.into_iter().map(Into::into).collect(), ..Self::client(common_name) }
    }

    /// The same, expired an hour ago.
    #[must_use]
    pub fn expired(self) -> Self {
        Self { age: Duration::from_secs(2 * 3600), lifetime: Duration::from_secs(3600), ..self }
    }

    /// The same, valid for this much longer from now.
    #[must_use]
    pub fn valid_for(self, left: Duration) -> Self {
        Self { lifetime: self.age + left, ..self }
    }
}

impl Pki {
    /// Makes a new authority in `dir`, over one that was there.
    pub fn create(dir: &Path) -> anyhow::Result<Self> {
        fs::create_dir_all(dir).with_context(|| format!("creating {}", dir.display()))?;
        let key = KeyPair::generate()?;
        let params = authority_params()?;
        let cert = params.self_signed(&key)?;
        write_whole(&dir.join("ca.key"), &key.serialize_pem())?;
        write_whole(&dir.join("ca.crt"), &cert.pem())?;
        Ok(Self { dir: dir.to_owned(), issuer: Issuer::new(params, key) })
    }

    /// Opens the authority that [`Pki::create`] left in `dir`.
    pub fn open(dir: &Path) -> anyhow::Result<Self> {
        let path = dir.join("ca.key");
        let key = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
        // Only name and key of the authority enter a signature, and the name is always the same.
        Ok(Self { dir: dir.to_owned(), issuer: Issuer::new(authority_params()?, KeyPair::from_pem(&key)?) })
    }

    /// Its folder.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Its own certificate, PEM.
    #[must_use]
    pub fn ca(&self) -> PathBuf {
        self.dir.join("ca.crt")
    }

    /// The files of a certificate, issued or not.
    #[must_use]
    pub fn files(&self, file: &str) -> CertFiles {
        let path = |extension| self.dir.join(format!("{file}.{extension}"));
        CertFiles { cert: path("crt"), key: path("key"), ca: self.ca() }
    }

    /// Issues a certificate with a new key. Files of the same name are replaced one by one, the key first: that is how
    /// a rotation looks to a reader.
    pub fn issue(&self, request: &CertRequest) -> anyhow::Result<CertFiles> {
        let mut params = CertificateParams::new(request.sans.clone()).context("the names of a certificate")?;
        let mut subject = DistinguishedName::new();
        subject.push(DnType::CommonName, &request.common_name);
        for organisation in &request.organisations {
            subject.push(DnType::OrganizationName, organisation);
        }
        params.distinguished_name = subject;
        params.not_before = date_time_ymd(1970, 1, 1) + wait::unix_time().saturating_sub(request.age);
        params.not_after = params.not_before + request.lifetime;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        let key = KeyPair::generate()?;
        let cert = params.signed_by(&key, &self.issuer)?;
        let files = self.files(&request.file);
        write_whole(&files.key, &key.serialize_pem())?;
        write_whole(&files.cert, &cert.pem())?;
        Ok(files)
    }

    /// A bare key pair, as the API server signs service account tokens with: private key, public key.
    pub fn key_pair(&self, file: &str) -> anyhow::Result<(PathBuf, PathBuf)> {
        let key = KeyPair::generate()?;
        let (private, public) = (self.dir.join(format!("{file}.key")), self.dir.join(format!("{file}.pub")));
        write_whole(&private, &key.serialize_pem())?;
        write_whole(&public, &key.public_key_pem())?;
        Ok((private, public))
    }
}

fn authority_params() -> anyhow::Result<CertificateParams> {
    let mut params = CertificateParams::new(Vec::<String>::new())?;
    let mut name = DistinguishedName::new();
    name.push(DnType::CommonName, "basal-e2e");
    params.distinguished_name = name;
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.not_before = date_time_ymd(2020, 1, 1);
    params.not_after = date_time_ymd(2120, 1, 1);
    Ok(params)
}

/// Writes a file of mode 0600 by renaming a finished one over it.
fn write_whole(path: &Path, text: &str) -> anyhow::Result<()> {
    let new = path.with_extension("new");
    fs::write(&new, text).with_context(|| format!("writing {}", new.display()))?;
    fs::set_permissions(&new, fs::Permissions::from_mode(0o600))?;
    fs::rename(&new, path).with_context(|| format!("renaming to {}", path.display()))
}
