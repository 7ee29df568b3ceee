//! The manifests in `k8s/`, and the pods that they describe: run as processes, with directories in place of volumes.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::process::Setup;

/// The root of the repository.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

/// All resources of a directory with a kustomization, and of the directories that it includes.
fn resources(directory: &Path) -> Vec<Value> {
    let kustomization = read(&directory.join("kustomization.yaml")).remove(0);
    let listed = kustomization["resources"].as_array().unwrap();
    assert_eq!(
        kustomization.as_object().unwrap().len(),
        3,
        "resources and nothing else: what stands in a file counts"
    );
    let mut files = BTreeSet::from(["kustomization.yaml".to_owned()]);
    let mut found = Vec::new();
    for name in listed {
        let name = name.as_str().unwrap();
        let path = directory.join(name);
        if path.is_dir() {
            found.extend(resources(&path));
        } else {
            files.insert(name.to_owned());
            found.extend(read(&path));
        }
    }
    let there = std::fs::read_dir(directory).unwrap();
    let there: BTreeSet<String> =
        there.map(|file| file.unwrap().file_name().into_string().unwrap()).collect();
    assert_eq!(there, files, "every file of {} is applied", directory.display());
    found
}

fn read(path: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(path).unwrap();
    let documents = serde_yaml_ng::Deserializer::from_str(&text);
    documents.map(|document| serde::Deserialize::deserialize(document).unwrap()).collect()
}

/// All resources of an overlay.
pub fn overlay(name: &str) -> Vec<Value> {
    resources(&root().join("k8s").join(name))
}

/// All resources of a kind.
pub fn of_kind<'a>(resources: &'a [Value], kind: &str) -> Vec<&'a Value> {
    resources.iter().filter(|resource| resource["kind"] == kind).collect()
}

/// The only resource of a kind.
pub fn one<'a>(resources: &'a [Value], kind: &str) -> &'a Value {
    let found = of_kind(resources, kind);
    assert_eq!(found.len(), 1, "{kind}");
    found[0]
}

/// Templates of the pods that these resources create.
pub fn pods(resources: &[Value]) -> Vec<&Value> {
    let makers =
        resources.iter().filter(|resource| matches!(resource["kind"].as_str(), Some("Deployment" | "Job")));
    makers.map(|maker| &maker["spec"]["template"]).collect()
}

/// The only container of a pod.
pub fn container(pod: &Value) -> &Value {
    let containers = pod["spec"]["containers"].as_array().unwrap();
    assert_eq!(containers.len(), 1);
    &containers[0]
}

/// The settings file that is mounted in the pods.
pub fn settings(resources: &[Value]) -> &str {
    one(resources, "ConfigMap")["data"]["perennial.toml"].as_str().unwrap()
}

/// An overlay, with the Secret that its README tells the operator to create.
#[derive(Debug)]
pub struct Cluster {
    /// All resources of the overlay.
    pub resources: Vec<Value>,
    keys: Setup,
    store_url: String,
    queue_url: String,
}

impl Cluster {
    /// Names of the entries of the Secret.
    pub const SECRETS: [&str; 5] = ["vapid.pem", "api.key", "admin.token", "store-url", "queue-url"];

    /// Creates an overlay that uses these servers.
    pub async fn new(overlay_name: &str, store_url: &str, queue_url: &str) -> Self {
        let keys = Setup::new();
        let made = keys.run(&["keys", "generate"]).await;
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        let resources = overlay(overlay_name);
        Self { resources, keys, store_url: store_url.to_owned(), queue_url: queue_url.to_owned() }
    }

    /// Value of an entry of the Secret.
    pub fn secret(&self, name: &str) -> String {
        match name {
            "store-url" => self.store_url.clone(),
            "queue-url" => self.queue_url.clone(),
            file => std::fs::read_to_string(self.keys.data_dir().join(file)).unwrap(),
        }
    }

    /// Setup of a pod as its manifest says, and the arguments of its container after the settings
    /// file: none for serving.
    pub fn pod(&self, template: &Value) -> (Setup, Vec<String>) {
        let setup = Setup::listening_as_configured();
        let (data, secrets) = (setup.data_dir(), setup.file("secrets"));
        std::fs::create_dir_all(&data).unwrap();
        std::fs::create_dir_all(&secrets).unwrap();
        let mounts = container(template)["volumeMounts"].as_array().unwrap();
        for mount in mounts.iter().filter(|mount| mount["name"] == "secrets") {
            let path = mount["mountPath"].as_str().unwrap();
            match mount["subPath"].as_str() {
                Some(name) => {
                    assert!(Self::SECRETS.contains(&name), "{name} is in the Secret");
                    let file = path.strip_prefix("/var/lib/perennial/").unwrap();
                    std::fs::write(data.join(file), self.secret(name)).unwrap();
                }
                None => {
                    assert_eq!(path, "/etc/perennial/secrets");
                    for name in Self::SECRETS {
                        std::fs::write(secrets.join(name), self.secret(name)).unwrap();
                    }
                }
            }
        }
        let text = settings(&self.resources).replace("/var/lib/perennial", data.to_str().unwrap());
        let text = text.replace("/etc/perennial/secrets", secrets.to_str().unwrap());
        let config = setup.file("perennial.toml");
        std::fs::write(&config, text).unwrap();
        let arguments = container(template)["args"].as_array().unwrap();
        let arguments: Vec<&str> = arguments.iter().map(|one| one.as_str().unwrap()).collect();
        let is_mounted = |mount: &Value| {
            mount["name"] == "config" && arguments[1].starts_with(mount["mountPath"].as_str().unwrap())
        };
        assert!(arguments[0] == "--config" && mounts.iter().any(is_mounted), "{arguments:?}");
        let command = arguments[2..].iter().map(ToString::to_string).collect();
        (setup.config(config.to_str().unwrap()).set("server.listen=127.0.0.1:0"), command)
    }
}
