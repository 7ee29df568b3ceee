#![doc = include_str!("../README.md")]

mod client;
mod connect;
mod encrypt;
mod lane;
mod message;
mod resolve;
mod sender;
mod subscription;
mod target;
mod vapid;
mod verdict;

pub use connect::HttpVersion;
pub use encrypt::{CryptoError, DecryptError, ReceiverKeys, encrypt};
pub use message::{MAX_PAYLOAD, Message, MessageError, Payload, Topic, Urgency};
pub use resolve::{Pin, ResolveError};
pub use sender::{Config, ConfigError, Report, Sender};
pub use subscription::{Keys, KeysError};
pub use target::{DEFAULT_HOSTS, Endpoint, HostPattern, Policy, TargetError};
pub use vapid::{Claims, Contact, ContactError, VapidError, VapidKey, verify};
pub use verdict::{MAX_RETRY_AFTER, Verdict, verdict};
