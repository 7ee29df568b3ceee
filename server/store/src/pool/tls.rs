//! TLS to the servers of stores.

use std::path::Path;
use std::sync::Arc;

use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use tracing::warn;

/// Creates the TLS configuration. The certificate of a server must be signed by an authority in the PEM file `ca_file`,
/// or, without such a file, by an authority that the system knows. The name of the server is always checked.
///
/// # Errors
/// When the file cannot be read, or holds no certificate.
pub(super) fn client(
    ca_file: Option<&Path>,
) -> Result<ClientConfig, Box<dyn std::error::Error + Send + Sync>> {
    let mut roots = RootCertStore::empty();
    match ca_file {
        Some(file) => {
            for certificate in CertificateDer::pem_file_iter(file)? {
                roots.add(certificate?)?;
            }
            if roots.is_empty() {
                return Err(format!("{} holds no certificate", file.display()).into());
            }
        }
        None => {
            let known = rustls_native_certs::load_native_certs();
            if let Some(error) = known.errors.first() {
                warn!(%error, "not all of the system's certificate authorities can be read");
            }
            roots.add_parsable_certificates(known.certs);
        }
    }
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions()?;
    Ok(builder.with_root_certificates(roots).with_no_client_auth())
}
