//! The key pairs that messages are encrypted with.
//!
//! RFC 8291, section 3.1 describes a new pair for every message. It is no requirement (there is no MUST in it), and
//! it is four fifths of the cost of a message. A pair that is kept for a while, with a new salt for each message,
//! is as safe for the content: RFC 8188, sections 2.1 and 2.2 derive the keys of many messages from one secret and
//! their salts. Two things are lost. A thief of the process's memory can read the messages that were sent with that
//! pair. And messages of one pair can be recognised as coming from the same sender, which the VAPID key shows
//! anyway.

use std::sync::Arc;
use std::time::{Duration, Instant};

use aws_lc_rs::agreement::{ECDH_P256, PrivateKey};
use aws_lc_rs::rand;
use parking_lot::Mutex;
use quick_cache::sync::{Cache, DefaultLifecycle};
use quick_cache::{DefaultHashBuilder, OptionsBuilder, UnitWeighter};
use sha2::{Digest, Sha256};

use crate::encrypt::{CryptoError, IKM, SALT, encrypt, input_keying_material, seal};
use crate::message::Payload;
use crate::subscription::{Keys, POINT};

/// Memory of one cache entry in bytes, as measured: its key, its value and the cache's own bookkeeping.
const ENTRY: u64 = 96;

/// Number of random bytes that are fetched at once: a whole number of salts.
const RANDOM: usize = 256 * SALT;

/// The way in which sender keys are made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SenderKey {
    /// A new pair for every message.
    #[default]
    Fresh,
    /// A pair per process, kept for a while.
    Rotating {
        /// Time for which a pair is used.
        life: Duration,
        /// Memory limit of the secrets that are derived with a pair, in bytes.
        cache: u64,
    },
}

#[derive(Debug)]
pub(crate) struct Keying {
    how: SenderKey,
    state: Mutex<KeyState>,
}

/// The pair in use, and random bytes for salts. They are fetched in bulk, since small fetches cost more than
/// everything else of a salt.
#[derive(Debug, Default)]
struct KeyState {
    pair: Option<Arc<Pair>>,
    random: Vec<u8>,
}

/// A pair in use and the secrets derived with it. They are never stored, and take no more memory than the settings
/// allow.
struct Pair {
    private: PrivateKey,
    public: [u8; POINT],
    made: Instant,
    derived: Derived,
}

type Derived = Cache<Who, [u8; IKM]>;

/// Makes a cache for `most` secrets. Broadcasts ask for all secrets in the same order, again and again. This cache
/// keeps as many of them as it can hold; a cache that evicts the oldest entry would have evicted each secret before
/// it is asked for again.
fn derived(most: usize) -> Result<Derived, CryptoError> {
    let options = OptionsBuilder::new()
        .estimated_items_capacity(most)
        .weight_capacity(most as u64)
        // No ghost entries of evicted keys: as measured, they change nothing here and take a fifth of the memory.
        .ghost_allocation(0.0)
        .build()
        .map_err(|_| CryptoError)?;
    let (hasher, life) = (DefaultHashBuilder::default(), DefaultLifecycle::default());
    Ok(Cache::with_options(options, UnitWeighter, hasher, life))
}

/// Cache key of a subscription: the first half of the SHA-256 of its keys. The keys themselves take five times as
/// much.
type Who = [u8; 16];

fn who(keys: &Keys) -> Who {
    let hash = Sha256::new().chain_update(keys.p256dh()).chain_update(keys.auth()).finalize();
    let mut who = [0; 16];
    who.copy_from_slice(&hash[..16]);
    who
}

impl std::fmt::Debug for Pair {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Pair")
    }
}

impl Keying {
    pub(crate) fn new(how: SenderKey) -> Self {
        Self { how, state: Mutex::default() }
    }

    /// Encrypts a payload for one subscription.
    pub(crate) fn encrypt(&self, keys: &Keys, payload: &Payload) -> Result<Vec<u8>, CryptoError> {
        let SenderKey::Rotating { life, cache } = self.how else { return encrypt(keys, payload) };
        let (pair, salt) = self.next(life, cache, Instant::now())?;
        let who = who(keys);
        let ikm = match pair.derived.get(&who) {
            Some(ikm) => ikm,
            None => {
                let ikm = input_keying_material(&pair.private, keys, &pair.public)?;
                pair.derived.insert(who, ikm);
                ikm
            }
        };
        Ok(seal(&ikm, &pair.public, payload.as_bytes(), salt)?)
    }

    /// Returns the pair in use, or a new one when it is older than `life`, and a salt that was not used before.
    fn next(&self, life: Duration, cache: u64, now: Instant) -> Result<(Arc<Pair>, [u8; SALT]), CryptoError> {
        let mut state = self.state.lock();
        if state.random.is_empty() {
            let mut random = vec![0; RANDOM];
            rand::fill(&mut random)?;
            state.random = random;
        }
        let at = state.random.len() - SALT;
        let mut salt = [0; SALT];
        salt.copy_from_slice(&state.random[at..]);
        state.random.truncate(at);
        if let Some(pair) = &state.pair
            && now.duration_since(pair.made) < life
        {
            return Ok((Arc::clone(pair), salt));
        }
        let private = PrivateKey::generate(&ECDH_P256)?;
        let public = private.compute_public_key()?.as_ref().try_into().map_err(|_| CryptoError)?;
        let derived = derived(usize::try_from(cache / ENTRY).unwrap_or(usize::MAX))?;
        let new = Arc::new(Pair { private, public, made: now, derived });
        state.pair = Some(Arc::clone(&new));
        Ok((new, salt))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::encrypt::{HEADER, ReceiverKeys};

    const HOUR: Duration = Duration::from_secs(3600);

    fn rotating() -> Keying {
        Keying::new(SenderKey::Rotating { life: HOUR, cache: 1 << 20 })
    }

    #[test]
    fn a_rotating_key_is_shared_and_its_salts_are_not() {
        let keying = rotating();
        let (one, two) = (ReceiverKeys::generate().unwrap(), ReceiverKeys::generate().unwrap());
        let payload = Payload::new("same").unwrap();
        let mut salts = std::collections::HashSet::new();
        let mut senders = std::collections::HashSet::new();
        for receiver in [&one, &two, &one, &two, &one] {
            let body = keying.encrypt(&receiver.keys(), &payload).unwrap();
            assert_eq!(receiver.decrypt(&body).unwrap(), b"same");
            salts.insert(body[..SALT].to_vec());
            senders.insert(body[SALT + 5..HEADER].to_vec());
        }
        assert_eq!((salts.len(), senders.len()), (5, 1));
    }

    #[test]
    fn a_pair_that_has_grown_old_is_replaced() {
        let keying = rotating();
        let now = Instant::now();
        let public = |at| keying.next(HOUR, 1 << 20, at).unwrap().0.public;
        let first = public(now);
        assert_eq!(public(now + HOUR - Duration::from_secs(1)), first);
        assert_ne!(public(now + HOUR), first);
    }

    #[test]
    fn broadcasts_to_more_than_fit_find_those_that_do() {
        let cache = derived(1000).unwrap();
        let mut found = 0;
        for _ in 0..3 {
            found = 0;
            for number in 0..3000_u128 {
                let who = number.wrapping_mul(0x9E37_79B9_7F4A_7C15_F39C_C060_5CED_C835).to_le_bytes();
                match cache.get(&who) {
                    Some(_) => found += 1,
                    None => cache.insert(who, [0; IKM]),
                }
            }
        }
        assert!(cache.len() <= 1100 && found > 800, "{found} of {}", cache.len());
    }

    #[test]
    fn the_same_secret_for_another_subscription_is_never_taken() {
        let keying = rotating();
        let payload = Payload::new("x").unwrap();
        let receiver = ReceiverKeys::generate().unwrap();
        keying.encrypt(&receiver.keys(), &payload).unwrap();
        let other_auth = Keys::from_bytes(receiver.keys().p256dh(), &[7; 16]).unwrap();
        let body = keying.encrypt(&other_auth, &payload).unwrap();
        assert!(receiver.decrypt(&body).is_err(), "it was made for another secret");
    }
}
