//! TLS for listeners: certificate, key, ALPN, and certificate renewal while the server runs.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use parking_lot::RwLock;
use rustls::ServerConfig;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::TlsAcceptor;
use x509_cert::der::Decode;

/// The files of a server's identity.
#[derive(Clone, Debug)]
pub struct Config {
    /// PEM: the certificate, then its chain.
    pub cert_file: PathBuf,
    /// PEM: the private key (PKCS#8, PKCS#1 or SEC1).
    pub key_file: PathBuf,
}

/// Why a server's identity cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file cannot be read, or holds no such PEM block.
    #[error("{}: no usable {wanted}", .file.display())]
    Pem {
        /// Path of the file.
        file: PathBuf,
        /// Kind of the expected PEM block: `certificate` or `private key`.
        wanted: &'static str,
        /// Error of the PEM reader.
        source: rustls_pki_types::pem::Error,
    },
    /// Certificate and key do not fit each other, or rustls cannot use them.
    #[error("the certificate and key cannot be used")]
    Identity(#[from] rustls::Error),
}

/// A server's identity, as last read from its files. A cheap handle.
#[derive(Clone)]
pub(crate) struct Identity(Arc<KeyFiles>);

struct KeyFiles {
    config: Config,
    alpn: Alpn,
    current: RwLock<(Stamp, TlsAcceptor)>,
}

/// Protocols that a listener offers (RFC 7301). One that speaks something else than HTTP offers none, so that a browser
/// that was sent there (ALPACA) is not taken for a client of it.
pub(crate) type Alpn = &'static [&'static [u8]];

/// HTTP/2 before HTTP/1.1.
pub(crate) const HTTP: Alpn = &[b"h2", b"http/1.1"];

/// Modification times of the certificate file and the key file.
type Stamp = [Option<SystemTime>; 2];

impl std::fmt::Debug for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Identity").field(&self.0.config.cert_file).finish()
    }
}

impl Identity {
    /// Reads the files.
    pub(crate) fn read(config: Config, alpn: Alpn) -> Result<Self, Error> {
        let current = (stamp(&config), acceptor(&config, alpn)?);
        Ok(Self(Arc::new(KeyFiles { config, alpn, current: RwLock::new(current) })))
    }

    /// Returns the acceptor for new connections.
    pub(crate) fn acceptor(&self) -> TlsAcceptor {
        self.0.current.read().1.clone()
    }

    /// Reads the files again if they have changed, and returns true if they had. On an error the old identity stays.
    ///
    /// # Errors
    /// When the new files cannot be used.
    pub(crate) fn refresh(&self) -> Result<bool, Error> {
        let KeyFiles { config, alpn, current } = &*self.0;
        let stamp = stamp(config);
        if stamp == current.read().0 {
            return Ok(false);
        }
        let acceptor = acceptor(config, alpn)?;
        *current.write() = (stamp, acceptor);
        Ok(true)
    }
}

/// Checks that the files can be read and that the key fits the certificate.
///
/// # Errors
/// When a listener could not be opened with the files.
pub fn check(config: &Config) -> Result<(), Error> {
    acceptor(config, &[]).map(drop)
}

/// Returns the time at which the first certificate of a file expires; `None` when it cannot be read.
pub fn ends_at(cert_file: &Path) -> Option<SystemTime> {
    let certificate = CertificateDer::pem_file_iter(cert_file).ok()?.next()?.ok()?;
    let certificate = x509_cert::Certificate::from_der(&certificate).ok()?;
    Some(certificate.tbs_certificate.validity.not_after.to_system_time())
}

fn stamp(config: &Config) -> Stamp {
    let changed = |file: &Path| std::fs::metadata(file).and_then(|file| file.modified()).ok();
    [changed(&config.cert_file), changed(&config.key_file)]
}

/// Reads the files, and offers these protocols.
fn acceptor(config: &Config, alpn: Alpn) -> Result<TlsAcceptor, Error> {
    let pem = |file: &PathBuf, wanted| {
        let file = file.clone();
        move |source| Error::Pem { file, wanted, source }
    };
    let chain = CertificateDer::pem_file_iter(&config.cert_file)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(pem(&config.cert_file, "certificate"))?;
    let key = PrivateKeyDer::from_pem_file(&config.key_file).map_err(pem(&config.key_file, "private key"))?;
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut server = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(chain, key)?;
    server.alpn_protocols = alpn.iter().map(|protocol| protocol.to_vec()).collect();
    Ok(TlsAcceptor::from(Arc::new(server)))
}
