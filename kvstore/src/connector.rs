//! One new connection to one endpoint: resolve, connect, shake hands with certificates read from disk just now.

use std::{
    collections::BTreeMap,
    future::Future,
    io,
    net::IpAddr,
    path::{Path, PathBuf},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use hyper_util::rt::TokioIo;
use rustls::{AlertDescription, ClientConfig, RootCertStore};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject};
use tokio::{
    io::{AsyncBufReadExt, AsyncRead, AsyncWrite, BufReader},
    net::TcpStream,
};
use tonic::transport::Uri;
use tower::Service;

use crate::config::{EndpointUrl, TlsFiles};

/// How long the server may take to say its first bytes after the handshake. In TLS 1.3 the client is done before the
/// server has looked at the client's certificate, so only these bytes prove that it was accepted. etcd sends them at
/// once; for a proxy that waits for the client the connection is used after this time all the same.
const GREETING_WAIT: Duration = Duration::from_secs(1);

/// Why there is no connection. Nothing of any request was sent.
#[derive(Debug, thiserror::Error)]
pub enum ConnectFailure {
    /// The name has no address.
    #[error("{endpoint}: the host name cannot be resolved: {source}")]
    Resolve {
        /// Where to.
        endpoint: EndpointUrl,
        /// Why.
        source: io::Error,
    },
    /// No address of the endpoint took a connection.
    #[error("{endpoint}: cannot connect: {source}")]
    Tcp {
        /// Where to.
        endpoint: EndpointUrl,
        /// The last address's error.
        source: io::Error,
    },
    /// A certificate or key file cannot be used.
    #[error("{}: {why}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong and what to do.
        why: String,
    },
    /// The server's certificate, or the server's TLS, is not acceptable to us.
    #[error("{endpoint}: TLS handshake failed: {source}; check trusted-ca-file and the names in etcd's certificate")]
    Handshake {
        /// Where to.
        endpoint: EndpointUrl,
        /// Why.
        source: io::Error,
    },
    /// The server does not accept our certificate.
    #[error("{endpoint}: etcd rejected the client certificate ({alert:?}); renew {}", certificate.display())]
    Rejected {
        /// Where to.
        endpoint: EndpointUrl,
        /// What the server said.
        alert: AlertDescription,
        /// The certificate that was sent, or what ought to name one.
        certificate: PathBuf,
    },
    /// The connection was not ready in time.
    #[error("{endpoint}: no connection within {after:?}")]
    TimedOut {
        /// Where to.
        endpoint: EndpointUrl,
        /// How long it was waited for.
        after: Duration,
    },
}

impl ConnectFailure {
    /// True when it is a matter of who we are, not of reachability.
    #[must_use]
    pub fn is_denied(&self) -> bool {
        matches!(self, Self::Rejected { .. })
    }
}

/// Both directions of a connection.
pub(crate) trait Duplex: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Duplex for T {}

/// Makes connections to one endpoint, whatever URI it is called with.
#[derive(Debug, Clone)]
pub(crate) struct Connector {
    pub(crate) endpoint: EndpointUrl,
    pub(crate) tls: Option<TlsFiles>,
    pub(crate) aliases: Arc<BTreeMap<String, Vec<IpAddr>>>,
    pub(crate) time_out: Duration,
}

impl Service<Uri> for Connector {
    type Response = TokioIo<Box<dyn Duplex>>;
    type Error = ConnectFailure;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, ConnectFailure>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), ConnectFailure>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Uri) -> Self::Future {
        let this = self.clone();
        Box::pin(async move {
            let (endpoint, after) = (this.endpoint.clone(), this.time_out);
            match tokio::time::timeout(after, this.connect()).await {
                Ok(result) => result.map(TokioIo::new),
                Err(_) => Err(ConnectFailure::TimedOut { endpoint, after }),
            }
        })
    }
}

impl Connector {
    async fn connect(self) -> Result<Box<dyn Duplex>, ConnectFailure> {
        // Files first: a missing one must not cost etcd a connection.
        let tls = match &self.tls {
            Some(files) if self.endpoint.tls => Some((client_config(files).await?, files)),
            _ => None,
        };
        let tcp = self.tcp().await?;
        let Some((config, files)) = tls else {
            return Ok(Box::new(tcp));
        };
        let server_name = ServerName::try_from(self.endpoint.host.clone()).map_err(|error| {
            ConnectFailure::Resolve { endpoint: self.endpoint.clone(), source: io::Error::other(error) }
        })?;
        let stream = tokio_rustls::TlsConnector::from(Arc::new(config))
            .connect(server_name, tcp)
            .await
            .map_err(|source| self.tls_failure(files, source))?;
        let mut stream = BufReader::new(stream);
        match tokio::time::timeout(GREETING_WAIT, stream.fill_buf()).await {
            Ok(Ok([])) => Err(self.tls_failure(files, io::ErrorKind::UnexpectedEof.into())),
            Ok(Err(source)) => Err(self.tls_failure(files, source)),
            Ok(Ok(_)) | Err(_) => Ok(Box::new(stream)),
        }
    }

    async fn tcp(&self) -> Result<TcpStream, ConnectFailure> {
        let EndpointUrl { host, port, .. } = &self.endpoint;
        let addresses: Vec<_> = match self.aliases.get(host) {
            Some(ips) => ips.iter().map(|ip| (*ip, *port).into()).collect(),
            None => tokio::net::lookup_host((host.as_str(), *port))
                .await
                .map_err(|source| ConnectFailure::Resolve { endpoint: self.endpoint.clone(), source })?
                .collect(),
        };
        let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
        for address in addresses {
            match TcpStream::connect(address).await {
                Ok(stream) => {
                    stream
                        .set_nodelay(true)
                        .map_err(|source| ConnectFailure::Tcp { endpoint: self.endpoint.clone(), source })?;
                    return Ok(stream);
                }
                Err(error) => last = error,
            }
        }
        Err(ConnectFailure::Tcp { endpoint: self.endpoint.clone(), source: last })
    }

    /// Tells a server that dislikes us from a server that we dislike.
    fn tls_failure(&self, files: &TlsFiles, source: io::Error) -> ConnectFailure {
        let endpoint = self.endpoint.clone();
        match source.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()) {
            Some(rustls::Error::AlertReceived(alert)) if is_about_our_certificate(*alert) => {
                let certificate = files.client.as_ref().map_or_else(|| PathBuf::from("cert-file"), |(c, _)| c.clone());
                ConnectFailure::Rejected { endpoint, alert: *alert, certificate }
            }
            _ => ConnectFailure::Handshake { endpoint, source },
        }
    }
}

/// The alerts of RFC 8446, section 6.2, that a server sends about the client's certificate.
fn is_about_our_certificate(alert: AlertDescription) -> bool {
    use AlertDescription as A;
    matches!(
        alert,
        A::NoCertificate
            | A::BadCertificate
            | A::UnsupportedCertificate
            | A::CertificateRevoked
            | A::CertificateExpired
            | A::CertificateUnknown
            | A::CertificateRequired
            | A::UnknownCA
            | A::AccessDenied
    )
}

async fn client_config(files: &TlsFiles) -> Result<ClientConfig, ConnectFailure> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(&files.ca).await? {
        roots.add(certificate).map_err(|error| bad_file(&files.ca, format!("holds an unusable CA: {error}")))?;
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| bad_file(&files.ca, format!("no TLS version can be used: {error}")))?
        .with_root_certificates(roots);
    let mut config = match &files.client {
        None => builder.with_no_client_auth(),
        Some((cert, key)) => {
            let chain = certificates(cert).await?;
            let pem = read(key).await?;
            let private = PrivateKeyDer::from_pem_slice(&pem)
                .map_err(|error| bad_file(key, format!("holds no PEM private key: {error}")))?;
            builder.with_client_auth_cert(chain, private).map_err(|error| {
                bad_file(cert, format!("does not go with {} ({error}); renew both together", key.display()))
            })?
        }
    };
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(config)
}

async fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, ConnectFailure> {
    let pem = read(path).await?;
    let list = CertificateDer::pem_slice_iter(&pem)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| bad_file(path, format!("is no PEM file: {error}")))?;
    if list.is_empty() {
        return Err(bad_file(path, "holds no PEM certificate".to_owned()));
    }
    Ok(list)
}

async fn read(path: &Path) -> Result<Vec<u8>, ConnectFailure> {
    tokio::fs::read(path).await.map_err(|error| {
        bad_file(path, format!("cannot be read: {error}; mount the Secret with etcd's certificates there"))
    })
}

fn bad_file(path: &Path, why: String) -> ConnectFailure {
    ConnectFailure::File { path: path.to_owned(), why }
}
