#![doc = include_str!("../README.md")]

mod addresses;
mod client;
mod connect;
mod encrypt;
mod gate;
mod http1;
mod http2;
mod keying;
mod lane;
mod message;
mod proxy;
mod reputation;
mod resolve;
mod sender;
mod service;
mod subscription;
mod target;
mod turns;
mod vapid;
mod verdict;
mod window;

pub use addresses::AddressStatus;
pub use connect::{HttpVersion, HttpVersionError};
pub use encrypt::{CryptoError, DecryptError, ReceiverKeys, encrypt};
pub use gate::Cause;
pub use keying::SenderKey;
pub use message::{MAX_PAYLOAD, Message, MessageError, Payload, Topic, Urgency};
pub use proxy::{Proxy, ProxyError};
pub use reputation::{HeldFor, Reputation};
pub use resolve::{Pin, ResolveError};
pub use sender::{Config, ConfigError, LaneStatus, Report, Sender};
pub use service::{Acceptance, ServiceStatus};
pub use subscription::{Keys, KeysError, decode as decode_base64};
pub use target::{DEFAULT_HOSTS, Endpoint, HostPattern, Policy, TargetError, not_public};
pub use vapid::{Claims, Contact, ContactError, ImportError, Signer, VapidError, VapidKey, verify};
pub use verdict::{MAX_RETRY_AFTER, Verdict, verdict};
