//! The interface between the host and an application, which is one type that implements [`Module`]. Web push, which is
//! hosted by default, uses the same interface.
//!
//! ```
//! use perennial_host::module::{Host, Module};
//! use perennial_host::settings::Reader;
//!
//! struct Hello {
//!     greeting: String,
//! }
//!
//! impl Module for Hello {
//!     const NAME: &'static str = "hello";
//!     const DEFAULTS: &'static str = "[hello]\n# How visitors are greeted.\ngreeting = \"Hello\"";
//!
//!     fn configure(settings: &mut Reader<'_>) -> Self {
//!         Self { greeting: settings.get("hello.greeting") }
//!     }
//!
//!     async fn mount(self, host: &mut Host) -> anyhow::Result<()> {
//!         let greet = move || std::future::ready(self.greeting.clone());
//!         host.routes(axum::Router::new().route("/hello", axum::routing::get(greet)));
//!         Ok(())
//!     }
//! }
//!
//! // fn main() -> std::process::ExitCode {
//! //     perennial_host::Perennial::new().host::<Hello>().main()
//! // }
//! # let _ = perennial_host::Perennial::new().host::<Hello>();
//! ```

use std::any::{Any, TypeId};
use std::collections::HashMap;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

use anyhow::Context as _;
use perennial_runtime::cpu::Cpu;
use perennial_runtime::drain::Drain;
use perennial_runtime::health::{Condition, Health, ReadinessPolicy};
use perennial_runtime::tasks::Tasks;
use perennial_store::cache::Caches;
use perennial_store::pool::redis::Redis;
use perennial_store::pool::sql::{Store, Tables};
use perennial_workers::{Job, Jobs, Registry, Schedule};
use serde_json::Value;
use utoipa_axum::router::OpenApiRouter;

use crate::access::{Access, Scope, Scopes};
use crate::boot::open;
use crate::command::Commands;
use crate::config::{Config, StoreConfig};
use crate::data_dir::DataDir;
pub use crate::data_dir::SecretFile;
use crate::http_client::{HttpClient, Target};
use crate::listeners::{self, Listener, ListenerHandlers, TcpHandler, UdpHandler};
use crate::locks::Locks;
use crate::maintenance;
use crate::names;
use crate::passwords::Passwords;
use crate::pools::{self, NamedPools, Pool};
use crate::sessions::{self, Sessions};
use crate::settings::{DEFAULTS, Problems, Reader, Settings, Sources};
use crate::sites::Sites;
use crate::tables;

/// An application that Perennial hosts.
pub trait Module: Sized + Send + 'static {
    /// Name of the module, in the store and in logs.
    const NAME: &'static str;

    /// Settings of the module with their defaults, as commented TOML. They become part of the schema.
    const DEFAULTS: &'static str = "";

    /// Migrations of its tables in SQL, the oldest step first. A step that was released must never be changed.
    const MIGRATIONS: &'static [&'static str] = &[];

    /// Migrations of its tables for Postgres. Without them, the module cannot be hosted on Postgres.
    const POSTGRES_MIGRATIONS: &'static [&'static str] = &[];

    /// Scopes of API keys that its routes ask for.
    const SCOPES: &'static [Scope] = &[];

    /// Modules that this one needs: they are mounted first. `&[Need::of::<Push>()]`
    const NEEDS: &'static [Need] = &[];

    /// Databases and Redis servers that the module uses beside the store. `&[Pool::database("reports")]`
    const POOLS: &'static [Pool] = &[];

    /// Listeners of the module for protocols of its own. `&[Listener::tcp("lines", "127.0.0.1:7000")]`
    const LISTENERS: &'static [Listener] = &[];

    /// Servers that the module calls by HTTP. `&[Target::new("mail", "https://api.mail.example/v1")]`
    const TARGETS: &'static [Target] = &[];

    /// Commands of the module on the command line.
    fn commands() -> Commands {
        Commands::default()
    }

    /// Secret files of the module, without which its rows in the store are worth nothing. `perennial keys show` shows
    /// them, and `perennial backup` and `perennial adopt` copy them.
    fn files(_settings: &Settings) -> Vec<SecretFile> {
        Vec::new()
    }

    /// Directories of the module within the data directory, which `perennial backup` copies with everything in them.
    const DIRECTORIES: &'static [&'static str] = &[];

    /// Makes the missing keys of the module, before the first start or when one was lost. Returns a label and a public
    /// value for each key, which are shown to the operator.
    fn keys(
        _settings: &Settings,
        _sites: &Sites,
        _data_dir: &DataDir,
        _store: &Store,
    ) -> impl Future<Output = anyhow::Result<Vec<(String, String)>>> + Send {
        async { Ok(Vec::new()) }
    }

    /// Reads the settings of the module, and changes nothing yet. Values that do not fit are noted in `settings`.
    fn configure(settings: &mut Reader<'_>) -> Self;

    /// Mounts the module: it hands in its routes, jobs and tasks, and warms up. The public listener opens after every
    /// module has been mounted.
    fn mount(self, host: &mut Host) -> impl Future<Output = anyhow::Result<()>> + Send;
}

/// A module that other modules use through a handle, which [`Host::get`] returns.
pub trait Provides: Module {
    /// The handle, which is cheap to clone.
    type Handle: Clone + Send + Sync + 'static;
}

/// A module that another one needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Need(&'static str);

impl Need {
    /// The need for the module `M`.
    pub const fn of<M: Module>() -> Self {
        Self(M::NAME)
    }
}

/// Status of a module, computed when an operator asks for it.
pub type StatusFn = Arc<dyn Fn() -> Value + Send + Sync>;

/// The host as a module sees it during its mount: the module uses the fields, and hands in its parts with the methods.
pub struct Host {
    /// The store.
    pub store: Store,
    /// The replica of the store that only reads (`store.read_url`), for statements that may see data of a moment ago; the
    /// store itself when there is none.
    pub replica: Store,
    /// The jobs.
    pub jobs: Jobs,
    /// Access control: the keys of callers.
    pub access: Access,
    /// The sites that are served.
    pub sites: Sites,
    /// Caches, whose entries all replicas drop together if jobs are in Redis.
    pub caches: Caches,
    /// The threads for processor work.
    pub cpu: Cpu,
    /// Locks and semaphores over all replicas.
    pub locks: Locks,
    /// The directory of keys and other files, locked by this process.
    pub data_dir: Arc<DataDir>,
    /// The stop signal.
    pub drain: Drain,
    /// Prefix of the routes of the module, without a slash at its end; empty without one. The routes that it hands in do
    /// not have it, and links to them need it.
    pub prefix: &'static str,
    /// Handles of modules, by the type of the module.
    pub(crate) handles: HashMap<TypeId, Box<dyn Any + Send + Sync>>,
    /// True when a module has opened sessions.
    pub(crate) has_sessions: bool,
    pub(crate) pools: NamedPools,
    pub(crate) clients: Vec<HttpClient>,
    pub(crate) listeners: ListenerHandlers,
    pub(crate) health: Health,
    pub(crate) tasks: Tasks,
    pub(crate) routes: OpenApiRouter,
    pub(crate) registry: Registry,
    pub(crate) schedules: Vec<Schedule>,
    pub(crate) status: Vec<(&'static str, StatusFn)>,
    pub(crate) announcements: Vec<Announcement>,
    pub(crate) closers: Vec<Closer>,
    pub(crate) admin_read: axum::Router,
    pub(crate) admin_write: axum::Router,
}

pub(crate) type Announcement = Box<dyn Fn(&str) -> String + Send>;
pub(crate) type Closer = Box<dyn FnOnce() -> Pin<Box<dyn Future<Output = ()> + Send>> + Send>;

impl fmt::Debug for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Host").field("registry", &self.registry).finish_non_exhaustive()
    }
}

impl Host {
    /// Hands in the handle of a module, for other modules.
    pub fn provide<M: Provides>(&mut self, handle: M::Handle) {
        self.handles.insert(TypeId::of::<M>(), Box::new(handle));
    }

    /// The handle of another module, which [`Module::NEEDS`] must name.
    ///
    /// # Errors
    /// When that module is not mounted yet.
    pub fn get<M: Provides>(&self) -> anyhow::Result<M::Handle> {
        let handle =
            self.handles.get(&TypeId::of::<M>()).and_then(|handle| handle.downcast_ref::<M::Handle>());
        let name = M::NAME;
        handle.cloned().with_context(|| {
            format!("the module {name} is not mounted: name it in NEEDS, so that it is mounted first")
        })
    }

    /// Opens the sessions of browsers. The schedule `sessions.retention` deletes sessions that have ended.
    ///
    /// # Errors
    /// When the key of their cookies can be neither read nor made.
    pub fn sessions(
        &mut self,
        config: sessions::Config,
    ) -> impl Future<Output = anyhow::Result<Sessions>> + Send + use<> {
        let mounted = if self.has_sessions { Ok(()) } else { maintenance::mount_sessions(self) };
        self.has_sessions = true;
        let (store, data_dir) = (self.store.clone(), Arc::clone(&self.data_dir));
        async move {
            mounted?;
            Sessions::open(store, &data_dir, config).await
        }
    }

    /// Passwords of users, hashed on the threads for processor work.
    pub fn passwords(&self) -> Passwords {
        Passwords::new(self.cpu.clone())
    }

    /// The database with this name, which [`Module::POOLS`] must name.
    ///
    /// # Errors
    /// When no module names it.
    pub fn database(&self, name: &str) -> anyhow::Result<Store> {
        self.pools.database(name)
    }

    /// The Redis server with this name, which [`Module::POOLS`] must name.
    ///
    /// # Errors
    /// When no module names it.
    pub fn redis(&self, name: &str) -> anyhow::Result<Redis> {
        self.pools.redis(name)
    }

    /// The HTTP client of a target, which [`Module::TARGETS`] must name.
    ///
    /// # Errors
    /// When no module names it.
    pub fn http_client(&self, target: &str) -> anyhow::Result<HttpClient> {
        let client = self.clients.iter().find(|client| client.name() == target);
        client.cloned().with_context(|| format!("no module names the target {target}: add it to its TARGETS"))
    }

    /// Serves the listener `name` with a handler of its bytes. [`Module::LISTENERS`] must name it.
    pub fn listen_tcp(&mut self, name: &'static str, handler: impl TcpHandler) {
        self.listeners.tcp(name, handler);
    }

    /// Serves the listener `name` with a handler of its datagrams. [`Module::LISTENERS`] must name it.
    pub fn listen_udp(&mut self, name: &'static str, handler: impl UdpHandler) {
        self.listeners.udp(name, handler);
    }

    /// Adds routes to the public listener: an `axum::Router`, or an `OpenApiRouter`, whose handlers are then described
    /// in `/openapi.json`.
    ///
    /// The state of a router is shared by all requests, and a handler cannot keep the state of its own request there:
    ///
    /// ```compile_fail,E0594
    /// use std::sync::Arc;
    ///
    /// use axum::extract::State;
    ///
    /// struct Shared {
    ///     user: String,
    /// }
    ///
    /// async fn remember(State(shared): State<Arc<Shared>>) {
    ///     shared.user = "ada".to_owned();
    /// }
    /// ```
    pub fn routes(&mut self, routes: impl Into<OpenApiRouter>) {
        self.routes = std::mem::take(&mut self.routes).merge(routes.into());
    }

    /// Registers a kind of job, which this process then runs with `tools`.
    pub fn job<J: Job>(&mut self, tools: J::Tools) {
        self.registry.register::<J>(tools);
    }

    /// Adds a schedule, which enqueues a job by the clock. Settings may change everything about it but its name
    /// (`cron.schedules`).
    ///
    /// # Panics
    /// When a schedule of this name exists already, which is a mistake in the program.
    pub fn schedule(&mut self, schedule: Schedule) {
        let twice = self.schedules.iter().any(|other| other.name == schedule.name);
        assert!(!twice, "the schedule {} is defined twice", schedule.name);
        self.schedules.push(schedule);
    }

    /// Runs up to `slots` jobs of a queue at once.
    pub fn serve_queue(&mut self, queue: &'static str, slots: usize) {
        self.registry.serve(queue, slots);
    }

    /// Adds a condition without which the process is not ready. It is unmet until [`Condition::met`] is called.
    pub fn readiness(&self, name: &'static str, reason: &str) -> Condition {
        self.health.condition(name, reason)
    }

    /// Adds a dependency of the module, such as a service of others. It counts as available until
    /// [`Condition::unmet`] is called; the policy says what that does to readiness.
    pub fn dependency(&self, name: &'static str, policy: ReadinessPolicy) -> Condition {
        self.health.dependency(name, policy)
    }

    /// Adds a status of the module, which operators read with `GET /modules`.
    pub fn status(&mut self, name: &'static str, status: impl Fn() -> Value + Send + Sync + 'static) {
        self.status.push((name, Arc::new(status)));
    }

    /// Adds routes to the admin listener that show something. They need the admin token, unless the listener is bound
    /// to loopback.
    pub fn admin_read(&mut self, routes: axum::Router) {
        self.admin_read = std::mem::take(&mut self.admin_read).merge(routes);
    }

    /// Adds routes to the admin listener that change something. They need the admin token, and pages of other origins
    /// may not use them.
    pub fn admin_write(&mut self, routes: axum::Router) {
        self.admin_write = std::mem::take(&mut self.admin_write).merge(routes);
    }

    /// Adds a line for a person who starts the program on a terminal. It is made from the URL of the public listener.
    pub fn announce(&mut self, line: impl Fn(&str) -> String + Send + 'static) {
        self.announcements.push(Box::new(line));
    }

    /// Runs a task beside requests and jobs. The task is started again when it fails, and must end when the drain says
    /// so.
    pub fn task<M, F>(&self, name: &'static str, make: M)
    where
        M: FnMut() -> F + Send + 'static,
        F: Future<Output = anyhow::Result<()>> + Send,
    {
        self.tasks.contained(name, make);
    }

    /// Adds a future that runs at the very end, when nothing uses the module any more.
    pub fn at_close<F>(&mut self, close: F)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        self.closers.push(Box::new(move || Box::pin(close)));
    }
}

type Mount = Box<
    dyn for<'a> FnOnce(&'a mut Host) -> Pin<Box<dyn Future<Output = anyhow::Result<()>> + Send + 'a>> + Send,
>;

/// A module whose type is erased, before its settings are read.
#[derive(Clone, Copy)]
pub(crate) struct Blueprint {
    pub(crate) name: &'static str,
    /// Prefix of its routes, or nothing.
    pub(crate) prefix: &'static str,
    pub(crate) defaults: &'static str,
    pub(crate) tables: Tables,
    pub(crate) scopes: &'static [Scope],
    pub(crate) needs: &'static [Need],
    pub(crate) pools: &'static [Pool],
    pub(crate) listeners: &'static [Listener],
    pub(crate) targets: &'static [Target],
    pub(crate) commands: fn() -> Commands,
    pub(crate) files: fn(&Settings) -> Vec<SecretFile>,
    pub(crate) directories: &'static [&'static str],
    pub(crate) keys: for<'a> fn(&'a Settings, &'a Sites, &'a DataDir, &'a Store) -> MadeKeys<'a>,
    pub(crate) configure: fn(&mut Reader<'_>) -> Mount,
}

pub(crate) type MadeKeys<'a> =
    Pin<Box<dyn Future<Output = anyhow::Result<Vec<(String, String)>>> + Send + 'a>>;

impl fmt::Debug for Blueprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}

impl Blueprint {
    pub(crate) fn of<M: Module>() -> Self {
        Self {
            name: M::NAME,
            prefix: "",
            defaults: M::DEFAULTS,
            tables: Tables { module: M::NAME, sqlite: M::MIGRATIONS, postgres: M::POSTGRES_MIGRATIONS },
            scopes: M::SCOPES,
            needs: M::NEEDS,
            pools: M::POOLS,
            listeners: M::LISTENERS,
            targets: M::TARGETS,
            commands: M::commands,
            files: M::files,
            directories: M::DIRECTORIES,
            keys: |settings, sites, data_dir, store| Box::pin(M::keys(settings, sites, data_dir, store)),
            configure: |settings| {
                let module = M::configure(settings);
                Box::new(move |host| Box::pin(module.mount(host)))
            },
        }
    }

    pub(crate) fn configure(&self, settings: &mut Reader<'_>) -> Configured {
        Configured { name: self.name, prefix: self.prefix, mount: (self.configure)(settings) }
    }
}

/// A module whose settings have been read.
pub(crate) struct Configured {
    pub(crate) name: &'static str,
    pub(crate) prefix: &'static str,
    pub(crate) mount: Mount,
}

/// Orders modules: a module comes after the modules that it needs, and otherwise modules keep the order in which the
/// program added them. The error names a module that is hosted twice, that needs one which is not hosted, or that needs
/// itself through others.
pub(crate) fn in_order(modules: &[Blueprint]) -> Result<Vec<Blueprint>, String> {
    let mut ordered: Vec<Blueprint> = Vec::new();
    let mut left = modules.to_vec();
    for (at, module) in modules.iter().enumerate() {
        let name = module.name;
        if modules[..at].iter().any(|other| other.name == name) {
            return Err(format!("two modules have the name {name}"));
        }
        let missing = module.needs.iter().find(|need| !modules.iter().any(|other| other.name == need.0));
        if let Some(Need(missing)) = missing {
            return Err(format!(
                "the module {name} needs the module {missing}, which is not hosted: add .host::<..>()"
            ));
        }
    }
    while !left.is_empty() {
        let is_met = |need: &Need| ordered.iter().any(|module| module.name == need.0);
        let next = left.iter().position(|module| module.needs.iter().all(is_met));
        let circle = || {
            let names: Vec<_> = left.iter().map(|module| module.name).collect();
            format!("modules need each other in a circle: {}", names.join(", "))
        };
        ordered.push(left.remove(next.ok_or_else(circle)?));
    }
    Ok(ordered)
}

/// Pairs each name of `named` with its module.
fn each<'a>(
    modules: impl Iterator<Item = &'a Blueprint>,
    named: impl Fn(&Blueprint) -> Vec<&'static str>,
) -> impl Iterator<Item = (&'a str, &'static str)> {
    modules.flat_map(move |module| named(module).into_iter().map(move |name| (module.name, name)))
}

/// Checks the prefixes of the modules.
fn check_prefixes(modules: &[Blueprint]) -> Result<(), String> {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "/-._~".contains(c);
    let is_valid = |prefix: &str| {
        prefix.is_empty()
            || (prefix.starts_with('/')
                && !prefix.ends_with('/')
                && !prefix.contains("//")
                && prefix.chars().all(is_plain))
    };
    match modules.iter().find(|module| !is_valid(module.prefix)) {
        None => Ok(()),
        Some(Blueprint { name, prefix, .. }) => {
            Err(format!("the module {name} is hosted at {prefix:?}: wanted a prefix such as \"/push\""))
        }
    }
}

/// Checks that no two modules have a table, a pool, a listener or a target of the same name.
pub(crate) fn without_clashes(modules: Vec<Blueprint>) -> Result<Vec<Blueprint>, String> {
    tables::check(&open::tables(modules.iter().map(|module| module.tables)))?;
    check_prefixes(&modules)?;
    let all = modules.iter();
    let named = |module: &Blueprint| module.pools.iter().map(|pool| pool.name()).collect::<Vec<_>>();
    names::check("pool", &pools::OF_HOST, each(all.clone(), named))?;
    let named = |module: &Blueprint| module.listeners.iter().map(|listener| listener.name()).collect();
    names::check("listener", &listeners::OF_HOST, each(all.clone(), named))?;
    let named = |module: &Blueprint| module.targets.iter().map(|target| target.name()).collect();
    names::check("target", &[], each(all, named))?;
    Ok(modules)
}

/// Merges the sources over the defaults of the host and of every module. [`read`] reports their problems.
pub(crate) fn load(sources: &Sources, modules: &[Blueprint]) -> Settings {
    let pools = modules.iter().flat_map(|module| module.pools).map(|pool| pool.defaults());
    let listeners = modules.iter().flat_map(|module| module.listeners).map(|listener| listener.defaults());
    let targets = modules.iter().flat_map(|module| module.targets).map(|target| target.defaults());
    let named: Vec<String> = pools.chain(listeners).chain(targets).collect();
    let of_modules = modules.iter().map(|module| module.defaults);
    let named = named.iter().map(String::as_str);
    let defaults: Vec<&str> = [DEFAULTS].into_iter().chain(of_modules).chain(named).collect();
    Settings::merge(&defaults, sources)
}

/// Reads all settings, also the settings of the modules.
pub(crate) fn read(
    settings: &Settings,
    modules: &[Blueprint],
) -> Result<(Config, Vec<Configured>), Problems> {
    let mut reader = Reader::new(settings);
    let mut config = Config::read(&mut reader, scopes(modules));
    config.pools =
        modules.iter().flat_map(|module| module.pools).map(|pool| pool.read(&mut reader)).collect();
    check_files(&mut reader, &config);
    let listeners = modules.iter().flat_map(|module| module.listeners);
    config.listeners = listeners.map(|listener| listener.read(&mut reader, &config.server.net)).collect();
    config.targets =
        modules.iter().flat_map(|module| module.targets).map(|target| target.read(&mut reader)).collect();
    listeners::share_connections(&mut reader, &mut config);
    let configured = modules.iter().map(|module| module.configure(&mut reader)).collect();
    config.notes = reader.take_notes();
    reader.finish()?;
    Ok((config, configured))
}

/// Refuses two embedded databases that have the same file.
fn check_files(reader: &mut Reader<'_>, config: &Config) {
    let of_store = match &config.store {
        StoreConfig::Sqlite { file, .. } => Some(config.data_dir.join(file)),
        StoreConfig::Postgres(_) => None,
    };
    let mut taken: Vec<_> = of_store.into_iter().collect();
    for pool in &config.pools {
        let Some(file) = pool.file().map(|file| config.data_dir.join(file)) else { continue };
        if taken.contains(&file) {
            reader.refuse::<()>(&pool.url_key(), "a file that no other database has");
        }
        taken.push(file);
    }
}

/// Collects the directories of all modules.
pub(crate) fn directories(modules: &[Blueprint]) -> Vec<&'static str> {
    modules.iter().flat_map(|module| module.directories.iter().copied()).collect()
}

/// Collects all scopes of this program.
pub(crate) fn scopes(modules: &[Blueprint]) -> Scopes {
    Scopes::new(modules.iter().flat_map(|module| module.scopes.iter().cloned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Shop;
    struct Mail;
    struct Log;

    macro_rules! modules {
        ($($module:ty, $name:literal, $needs:expr;)*) => {$(
            impl Module for $module {
                const NAME: &'static str = $name;
                const NEEDS: &'static [Need] = $needs;

                fn configure(_: &mut Reader<'_>) -> Self {
                    unreachable!()
                }

                async fn mount(self, _: &mut Host) -> anyhow::Result<()> {
                    Ok(())
                }
            }
        )*};
    }

    modules! {
        Shop, "shop", &[Need::of::<Mail>()];
        Mail, "mail", &[Need::of::<Log>()];
        Log, "log", &[];
    }

    struct Egg;
    struct Hen;

    modules! {
        Egg, "egg", &[Need::of::<Hen>()];
        Hen, "hen", &[Need::of::<Egg>()];
    }

    #[test]
    fn modules_come_after_those_that_they_need() {
        let (shop, mail, log) = (Blueprint::of::<Shop>(), Blueprint::of::<Mail>(), Blueprint::of::<Log>());
        let names = |modules: &[Blueprint]| {
            in_order(modules).map(|ordered| ordered.iter().map(|module| module.name).collect::<Vec<_>>())
        };
        assert_eq!(names(&[shop, log, mail]).unwrap(), ["log", "mail", "shop"]);
        assert!(names(&[shop, log]).unwrap_err().contains("needs the module mail"));
        assert!(names(&[log, log]).unwrap_err().contains("two modules"));
        let circle = names(&[Blueprint::of::<Egg>(), log, Blueprint::of::<Hen>()]).unwrap_err();
        assert!(circle.ends_with("egg, hen"), "{circle}");
    }
}
