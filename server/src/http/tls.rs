//! TLS for listeners: certificate, key, ALPN.

use std::path::PathBuf;
use std::sync::Arc;

use rustls::ServerConfig;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::TlsAcceptor;

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
        /// The file.
        file: PathBuf,
        /// What was looked for in it.
        wanted: &'static str,
        /// What the reader said.
        source: rustls_pki_types::pem::Error,
    },
    /// Certificate and key do not fit each other, or rustls cannot use them.
    #[error("the certificate and key cannot be used")]
    Identity(#[from] rustls::Error),
}

/// Reads the files and offers HTTP/2 before HTTP/1.1.
pub(super) fn acceptor(config: &Config) -> Result<TlsAcceptor, Error> {
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
    server.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(TlsAcceptor::from(Arc::new(server)))
}
