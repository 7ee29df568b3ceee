//! The web push settings of each site: public tags, secret for user tokens, webhooks, contact and VAPID keys.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use http::Uri;
use perennial_server::http::problem::Problem;
use perennial_webpush::{Contact, ContactError};
use secrecy::{ExposeSecret, SecretString};

use crate::model::tags;
use perennial_host::api::not_found;
use perennial_host::settings::{Reader, Setting};
use perennial_host::sites::{self, SECTION, SiteId, Sites};

/// The file of the default site's VAPID keys.
pub(crate) const VAPID_KEY: &str = "vapid.pem";
/// The shortest secret for user tokens and for webhooks, in bytes.
const MIN_SECRET: usize = 16;

/// A webhook in the settings.
#[derive(Clone)]
pub(crate) struct Registered {
    pub(crate) url: Uri,
    pub(crate) secret: SecretString,
    /// Whether the webhook is also told about each subscription that is deleted.
    pub(crate) pruned: bool,
}

impl fmt::Debug for Registered {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.url)
    }
}

/// The web push settings of one site.
#[derive(Debug)]
pub(crate) struct Profile {
    /// The site's name.
    pub(crate) name: String,
    /// Tags that pages may set.
    pub(crate) public_tags: Arc<[String]>,
    /// The secret that user tokens of pages are made with.
    pub(crate) user_secret: Option<SecretString>,
    /// The webhooks that notifications may name.
    pub(crate) webhooks: BTreeMap<String, Registered>,
    /// The contact for push services that have questions about the messages of the site.
    pub(crate) contact: Option<Contact>,
    /// The place of the VAPID keys of the site.
    pub(crate) vapid: KeyPlace,
}

/// The place of the VAPID keys of a site.
#[derive(Clone, Debug)]
pub(crate) struct KeyPlace {
    /// A file that the settings name, or one inside the data directory.
    pub(crate) file: String,
    /// Name of the keys in a store that replicas share.
    pub(crate) shared: String,
}

/// Reads where the VAPID keys of all sites are, with the names of the sites. No file is read: it may be a pipe.
pub(crate) fn places(settings: &mut Reader<'_>) -> Vec<(String, KeyPlace)> {
    let sites = settings.names(SECTION).into_iter();
    sites.map(|site| (site.clone(), place(settings, &site))).collect()
}

/// Reads the profiles of all sites, with `contact` for sites that have none of their own.
pub(crate) fn read(settings: &mut Reader<'_>, contact: Option<&Contact>) -> Vec<Profile> {
    settings.names(SECTION).into_iter().map(|name| read_one(settings, name, contact)).collect()
}

/// The profiles of the sites that are served. Cloning is cheap.
#[derive(Clone, Debug)]
pub(crate) struct Profiles(Arc<HashMap<SiteId, Profile>>);

impl Profiles {
    /// Keeps the profiles of the sites that are served.
    pub(crate) fn of(profiles: Vec<Profile>, sites: &Sites) -> Self {
        let known =
            profiles.into_iter().filter_map(|profile| Some((sites.named(&profile.name)?.id, profile)));
        Self(Arc::new(known.collect()))
    }

    /// Returns the profile of a site, if the site is served.
    pub(crate) fn find(&self, site: SiteId) -> Option<&Profile> {
        self.0.get(&site)
    }

    /// Returns the profile of a site, for a request.
    ///
    /// # Errors
    /// 404 for a site that is not served; API keys belong to sites that are served.
    pub(crate) fn get(&self, site: SiteId) -> Result<&Profile, Problem> {
        self.find(site).ok_or_else(|| not_found("site"))
    }

    /// Returns all profiles.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (&SiteId, &Profile)> {
        self.0.iter()
    }
}

fn read_one(settings: &mut Reader<'_>, name: String, default: Option<&Contact>) -> Profile {
    let key = |part: &str| format!("{SECTION}.{name}.{part}");
    let public_tags: Vec<String> = settings.read_with(&key("public_tags"), "a list of tags", |value| {
        let tags = <Vec<String> as Setting>::read(value)?;
        tags.iter().all(|tag| tags::is_tag(tag)).then_some(tags)
    });
    let user_secret = settings.secret_file(&key("user_secret_file"));
    if user_secret.as_ref().is_some_and(|secret| secret.expose_secret().len() < MIN_SECRET) {
        let wanted = "a file with a secret of at least 16 bytes; a shorter one is easy to guess";
        settings.refuse::<()>(&key("user_secret_file"), wanted);
    }
    let contact = contact(settings, &key("contact")).or_else(|| default.cloned());
    let webhooks = webhooks(settings, &key("webhooks"));
    let vapid = place(settings, &name);
    Profile { name, public_tags: public_tags.into(), user_secret, webhooks, contact, vapid }
}

fn contact(settings: &mut Reader<'_>, key: &str) -> Option<Contact> {
    let text: String = settings.get(key);
    match text.parse() {
        Ok(contact) => Some(contact),
        Err(_) if text.is_empty() => None,
        Err(error) => settings.refuse(key, &ContactError::to_string(&error)),
    }
}

fn place(settings: &mut Reader<'_>, site: &str) -> KeyPlace {
    let key = &format!("{SECTION}.{site}.vapid_key_file");
    let own = if site == sites::DEFAULT { VAPID_KEY.to_owned() } else { format!("vapid.{site}.pem") };
    let file = settings.file(key);
    if file.as_ref().is_some_and(|file| !file.is_absolute()) {
        settings.refuse::<()>(key, "an absolute path");
    }
    let file = file.map(|file| file.to_string_lossy().into_owned());
    KeyPlace { file: file.unwrap_or_else(|| own.clone()), shared: own }
}

/// Reads the webhooks of a site.
fn webhooks(settings: &mut Reader<'_>, key: &str) -> BTreeMap<String, Registered> {
    let wanted = "a list of { name, url, secret_file, pruned = false }";
    let found: Vec<(String, http::Uri, PathBuf, bool)> = settings.read_with(key, wanted, |value| {
        let webhook = |webhook: &toml::Value| {
            let text = |key: &str| webhook.get(key).and_then(toml::Value::as_str);
            let url: http::Uri = text("url")?.parse().ok()?;
            let is_web = matches!(url.scheme_str(), Some("http" | "https"));
            let pruned = webhook.get("pruned").is_some_and(|pruned| pruned.as_bool() == Some(true));
            let known = ["name", "url", "secret_file", "pruned"];
            let only_known = webhook.as_table()?.keys().all(|key| known.contains(&key.as_str()));
            (is_web && only_known).then_some(())?;
            Some((text("name")?.to_owned(), url, text("secret_file")?.into(), pruned))
        };
        value.as_array()?.iter().map(webhook).collect()
    });
    let mut registered = BTreeMap::new();
    for (name, url, file, pruned) in found {
        match std::fs::read_to_string(&file) {
            Ok(secret) if secret.trim().len() >= MIN_SECRET => {
                let secret = secret.trim().to_owned().into();
                registered.insert(name, Registered { url, secret, pruned });
            }
            _ => {
                let wanted = format!("that {} is a file with a secret of at least 16 bytes", file.display());
                settings.refuse::<()>(key, &wanted);
            }
        }
    }
    registered
}
