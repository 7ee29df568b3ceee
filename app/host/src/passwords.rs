//! Passwords of users: Argon2id (RFC 9106) on the threads for processor work, so that a login takes no time from other
//! requests.

use std::time::{Duration, Instant};

use argon2::password_hash::phc::PasswordHash;
use argon2::{Argon2, Params, PasswordHasher, PasswordVerifier};
use perennial_runtime::cpu::{Cpu, CpuError};
use secrecy::{ExposeSecret, SecretString};

/// Longest password, in bytes. A longer one would only take time.
const MAX_PASSWORD: usize = 1024;
/// Time limit for one hash, with the wait for a thread.
const PATIENCE: Duration = Duration::from_secs(10);

/// Error of a password.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The password is too long.
    #[error("wanted a password of at most {MAX_PASSWORD} bytes")]
    TooLong,
    /// The processor threads have too much to do. The same request may succeed in a moment.
    #[error(transparent)]
    Busy(#[from] CpuError),
    /// The random generator of the system failed, or memory is short.
    #[error("the password cannot be hashed: {0}")]
    Failed(String),
}

/// Whether a password is right.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PasswordCheck {
    /// It is right.
    Right,
    /// It is right, and should be hashed and stored anew: the parameters have been raised since.
    RightButWeak,
    /// It is wrong, or there is no such user.
    Wrong,
}

/// Hashes passwords and checks them. A cheap handle.
#[derive(Clone, Debug)]
pub struct Passwords {
    cpu: Cpu,
}

impl Passwords {
    /// Makes a handle that works on these threads.
    pub fn new(cpu: Cpu) -> Self {
        Self { cpu }
    }

    /// Hashes a password. The text has the parameters and the salt (PHC string format), and is what to store.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn hash(&self, password: &SecretString) -> Result<String, Error> {
        let password = checked(password)?;
        let hash = move || {
            let hashed = Argon2::default().hash_password(password.expose_secret().as_bytes());
            hashed.map(|hash| hash.to_string()).map_err(|error| Error::Failed(error.to_string()))
        };
        self.cpu.run(Instant::now() + PATIENCE, hash).await?
    }

    /// Checks a password against the stored hash. Without a hash, since there is no such user, it takes as long and is
    /// wrong: the time of the answer does not tell who is a user.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn check(&self, password: &SecretString, hash: Option<&str>) -> Result<PasswordCheck, Error> {
        let password = checked(password)?;
        let hash = hash.map(str::to_owned);
        let check = move || {
            let password = password.expose_secret().as_bytes();
            match hash.as_deref().map(PasswordHash::new) {
                Some(Ok(hash)) => match Argon2::default().verify_password(password, &hash) {
                    Ok(()) if is_weak(&hash) => PasswordCheck::RightButWeak,
                    Ok(()) => PasswordCheck::Right,
                    Err(_) => PasswordCheck::Wrong,
                },
                Some(Err(_)) | None => {
                    let _ = Argon2::default().hash_password(password);
                    PasswordCheck::Wrong
                }
            }
        };
        Ok(self.cpu.run(Instant::now() + PATIENCE, check).await?)
    }
}

fn checked(password: &SecretString) -> Result<SecretString, Error> {
    if password.expose_secret().len() > MAX_PASSWORD { Err(Error::TooLong) } else { Ok(password.clone()) }
}

/// Returns true when a hash was made with less memory or fewer passes than new ones are.
fn is_weak(hash: &PasswordHash) -> bool {
    let wanted = Params::default();
    Params::try_from(hash)
        .is_ok_and(|found| found.m_cost() < wanted.m_cost() || found.t_cost() < wanted.t_cost())
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroUsize;

    use argon2::{Algorithm, Version};
    use perennial_runtime::cpu;

    use super::*;

    fn passwords() -> Passwords {
        Passwords::new(Cpu::start(cpu::Config { threads: NonZeroUsize::MIN, queue: 8 }).unwrap())
    }

    #[tokio::test]
    async fn only_the_right_password_is_right() {
        let (passwords, right, wrong) = (passwords(), "correct horse".into(), "battery staple".into());
        let (one, other) = (passwords.hash(&right).await.unwrap(), passwords.hash(&right).await.unwrap());
        assert!(one.starts_with("$argon2id$") && one != other, "each hash has a salt of its own");
        assert_eq!(passwords.check(&right, Some(&one)).await.unwrap(), PasswordCheck::Right);
        assert_eq!(passwords.check(&wrong, Some(&one)).await.unwrap(), PasswordCheck::Wrong);
        assert_eq!(passwords.check(&right, None).await.unwrap(), PasswordCheck::Wrong);
        assert_eq!(passwords.check(&right, Some("no hash")).await.unwrap(), PasswordCheck::Wrong);
        let long = "x".repeat(MAX_PASSWORD + 1).into();
        assert!(matches!(passwords.hash(&long).await, Err(Error::TooLong)));
    }

    #[tokio::test]
    async fn a_weak_hash_is_to_be_made_anew() {
        let params = Params::new(8192, 1, 1, None).unwrap();
        let weak = Argon2::new(Algorithm::Argon2id, Version::V0x13, params);
        let hash = weak.hash_password(b"x").unwrap().to_string();
        let check = passwords().check(&"x".into(), Some(&hash)).await.unwrap();
        assert_eq!(check, PasswordCheck::RightButWeak);
    }
}
