//! A certificate authority for a test, and a certificate that it has signed.

use std::path::PathBuf;

use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use tempfile::TempDir;

/// A certificate for `localhost` and 127.0.0.1, its key, and the authority that signed it, as PEM files.
#[derive(Debug)]
pub struct Certificates {
    directory: TempDir,
}

impl Certificates {
    /// Creates the files. All users can read them, except the key, which belongs to Postgres if we are root.
    pub fn new() -> Self {
        let directory = TempDir::new().unwrap();
        let authority_key = KeyPair::generate().unwrap();
        let mut authority = CertificateParams::new(Vec::<String>::new()).unwrap();
        authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let authority_pem = authority.self_signed(&authority_key).unwrap().pem();
        let issuer = Issuer::new(authority, authority_key);
        let key = KeyPair::generate().unwrap();
        let names = ["localhost".to_owned(), "127.0.0.1".to_owned()];
        let server = CertificateParams::new(names).unwrap().signed_by(&key, &issuer).unwrap();
        let made = Self { directory };
        let shell = |command: &str| {
            let ended = std::process::Command::new("sh").args(["-c", command]).status().unwrap();
            assert!(ended.success(), "{command}");
        };
        std::fs::write(made.authority(), authority_pem).unwrap();
        std::fs::write(made.certificate(), server.pem()).unwrap();
        std::fs::write(made.key(), key.serialize_pem()).unwrap();
        let directory = made.directory.path().display();
        shell(&format!("chmod 755 {directory} && chmod 600 {}", made.key().display()));
        if rustix::process::geteuid().is_root() {
            shell(&format!("chown postgres {}", made.key().display()));
        }
        made
    }

    /// File of the authority's certificate.
    pub fn authority(&self) -> PathBuf {
        self.directory.path().join("authority.pem")
    }

    /// File of the server's certificate.
    pub fn certificate(&self) -> PathBuf {
        self.directory.path().join("certificate.pem")
    }

    /// File of the server's key.
    pub fn key(&self) -> PathBuf {
        self.directory.path().join("key.pem")
    }
}

impl Default for Certificates {
    fn default() -> Self {
        Self::new()
    }
}
