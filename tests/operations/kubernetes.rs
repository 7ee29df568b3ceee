//! The manifests and the image fit the program, each other, and the rules of Kubernetes.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use aws_lc_rs::digest::{SHA256, digest};
use serde_json::Value;

use support::kubernetes::{Cluster, container, of_kind, one, overlay, pods, root, settings};
use support::postgres::Database;
use support::process::{Setup, binary};
use support::redis::Prefix;

/// Schemas against which the manifests are checked: the oldest supported version, and a new one.
const VERSIONS: [&str; 2] = ["1.32", "1.34"];
const OVERLAYS: [&str; 2] = ["embedded", "production"];
/// Maximum time from the end of the drain to the end of the process: closing pools, flushing the log.
const CLOSING: Duration = Duration::from_secs(5);

/// Seconds of a setting such as "10s".
fn seconds(settings: &toml::Table, section: &str, key: &str) -> u64 {
    settings[section][key].as_str().unwrap().strip_suffix('s').unwrap().parse().unwrap()
}

#[test]
fn manifests_fit_the_schemas_of_kubernetes() {
    let validate = root().join("target/tools/kubernetes-validate/bin/kubernetes-validate");
    for name in OVERLAYS {
        for resource in overlay(name) {
            // This resource belongs to the Prometheus operator, and Kubernetes has no schema of it.
            if resource["kind"] == "ServiceMonitor" {
                continue;
            }
            let file = tempfile::NamedTempFile::with_suffix(".yaml").unwrap();
            std::fs::write(file.path(), serde_yaml_ng::to_string(&resource).unwrap()).unwrap();
            for version in VERSIONS {
                let checked = Command::new(&validate)
                    .args(["--strict", "--kubernetes-version", version])
                    .arg(file.path())
                    .output()
                    .expect("tests/run installs it");
                let said = String::from_utf8_lossy(&checked.stdout).into_owned();
                assert!(checked.status.success(), "{name} {}: {said}", resource["kind"]);
            }
        }
    }
}

#[test]
fn probes_ports_and_periods_are_those_of_the_program() {
    for name in OVERLAYS {
        let resources = overlay(name);
        let deployment = one(&resources, "Deployment");
        let pod = &deployment["spec"]["template"];
        let container = container(pod);
        let text = settings(&resources);
        let settings: toml::Table = text.parse().unwrap();
        let port_of = |section: &str| -> u64 {
            settings[section]["listen"][0].as_str().unwrap().rsplit_once(':').unwrap().1.parse().unwrap()
        };
        let ports: BTreeMap<&str, u64> = container["ports"]
            .as_array()
            .unwrap()
            .iter()
            .map(|port| (port["name"].as_str().unwrap(), port["containerPort"].as_u64().unwrap()))
            .collect();
        assert_eq!(ports, BTreeMap::from([("http", port_of("server")), ("admin", port_of("admin"))]));
        for (probe, path) in
            [("startupProbe", "/startupz"), ("livenessProbe", "/livez"), ("readinessProbe", "/readyz")]
        {
            assert_eq!(container[probe]["httpGet"]["path"], path);
            assert_eq!(container[probe]["httpGet"]["port"], "admin");
        }
        // The pod serves until load balancers have noticed the drain: readiness must have been
        // probed, and failed, by then.
        let readiness = container["readinessProbe"]["periodSeconds"].as_u64().unwrap();
        let notice = seconds(&settings, "drain", "notice");
        assert!(readiness < notice);
        let drain = notice + seconds(&settings, "drain", "soft") + seconds(&settings, "drain", "hard");
        let grace = pod["spec"]["terminationGracePeriodSeconds"].as_u64().unwrap();
        assert!(grace >= drain + CLOSING.as_secs(), "{grace} s for a drain of {drain} s");
        assert!(
            container["lifecycle"].is_null(),
            "the notice is in the process: a preStop sleep would be a second"
        );
        let sum = digest(&SHA256, text.as_bytes());
        let sum: String = sum.as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
        let written = &pod["metadata"]["annotations"]["checksum/config"];
        assert_eq!(written, sum.as_str(), "run k8s/checksum k8s/{name}");
    }
}

/// A key or a value that the program does not know would stop every pod of a rollout.
#[tokio::test]
async fn settings_of_both_are_those_of_the_program() {
    for name in OVERLAYS {
        let setup = Setup::new();
        let file = setup.file("perennial.toml");
        std::fs::write(&file, settings(&overlay(name))).unwrap();
        let secrets = setup.file("secrets");
        std::fs::create_dir(&secrets).unwrap();
        let mounted = std::fs::read_to_string(&file).unwrap();
        let mounted = mounted.replace("/etc/perennial/secrets", secrets.to_str().unwrap());
        std::fs::write(&file, mounted).unwrap();
        std::fs::write(secrets.join("store-url"), "postgres://perennial@127.0.0.1/perennial").unwrap();
        std::fs::write(secrets.join("queue-url"), "redis://127.0.0.1/0").unwrap();
        for name in Cluster::SECRETS.into_iter().filter(|name| !name.ends_with("-url")) {
            std::fs::write(secrets.join(name), "a".repeat(43)).unwrap();
        }
        let checked = setup.run(&["check", "--config", file.to_str().unwrap()]).await;
        assert!(checked.status.success(), "{name}: {}", String::from_utf8_lossy(&checked.stderr));
    }
}

#[test]
fn all_pods_together_do_not_use_up_the_connections_of_postgres() {
    let resources = overlay("production");
    let settings: toml::Table = settings(&resources).parse().unwrap();
    let connections = settings["store"]["connections"].as_integer().unwrap();
    let most = one(&resources, "HorizontalPodAutoscaler")["spec"]["maxReplicas"].as_i64().unwrap();
    let rolled = one(&resources, "Deployment")["spec"]["strategy"]["rollingUpdate"]["maxSurge"].as_i64();
    // Each pod has one connection more, which listens; three are reserved for administrators.
    let used = (most + rolled.unwrap()) * (connections + 1);
    assert!(used <= 97, "{used}");
}

#[test]
fn resources_name_each_other_as_they_are_called() {
    for name in OVERLAYS {
        let resources = overlay(name);
        let named = |kind: &str| -> BTreeSet<&str> {
            of_kind(&resources, kind).iter().map(|one| one["metadata"]["name"].as_str().unwrap()).collect()
        };
        let deployment = one(&resources, "Deployment");
        let labels = &deployment["spec"]["template"]["metadata"]["labels"];
        assert_eq!(&deployment["spec"]["selector"]["matchLabels"], labels);
        for service in of_kind(&resources, "Service") {
            assert_eq!(&service["spec"]["selector"], labels);
            let is_for_metrics = service["metadata"]["name"] == "perennial-metrics";
            for port in service["spec"]["ports"].as_array().unwrap() {
                let wanted = if is_for_metrics { "admin" } else { "http" };
                assert_eq!(
                    port["targetPort"], wanted,
                    "the admin port is in no Service but that for metrics"
                );
            }
            assert!(service["spec"]["type"].is_null(), "inside of the cluster only");
        }
        assert_eq!(&one(&resources, "NetworkPolicy")["spec"]["podSelector"]["matchLabels"], labels);
        for budget in of_kind(&resources, "PodDisruptionBudget") {
            assert_eq!(&budget["spec"]["selector"]["matchLabels"], labels);
        }
        for autoscaler in of_kind(&resources, "HorizontalPodAutoscaler") {
            assert_eq!(autoscaler["spec"]["scaleTargetRef"]["name"], deployment["metadata"]["name"]);
            assert!(deployment["spec"]["replicas"].is_null(), "they are the autoscaler's");
        }
        for pod in pods(&resources) {
            if let Some(account) = pod["spec"]["serviceAccountName"].as_str() {
                assert!(named("ServiceAccount").contains(account));
            }
            let volumes: BTreeSet<&str> = pod["spec"]["volumes"]
                .as_array()
                .unwrap()
                .iter()
                .map(|one| one["name"].as_str().unwrap())
                .collect();
            for mount in container(pod)["volumeMounts"].as_array().unwrap() {
                assert!(volumes.contains(mount["name"].as_str().unwrap()), "{mount}");
            }
            for volume in pod["spec"]["volumes"].as_array().unwrap() {
                if let Some(map) = volume["configMap"]["name"].as_str() {
                    assert!(named("ConfigMap").contains(map));
                }
                if let Some(claim) = volume["persistentVolumeClaim"]["claimName"].as_str() {
                    assert!(named("PersistentVolumeClaim").contains(claim));
                }
            }
        }
    }
}

/// The rules are the restricted Pod Security Standard and a read-only root file system.
#[test]
fn pods_keep_to_the_restricted_standard() {
    for name in OVERLAYS {
        for pod in pods(&overlay(name)) {
            let (spec, container) = (&pod["spec"], container(pod));
            assert_eq!(spec["automountServiceAccountToken"], false);
            assert_eq!(spec["securityContext"]["runAsNonRoot"], true);
            assert!(spec["securityContext"]["runAsUser"].as_u64().unwrap() > 0);
            assert_eq!(spec["securityContext"]["seccompProfile"]["type"], "RuntimeDefault");
            assert_eq!(container["securityContext"]["allowPrivilegeEscalation"], false);
            assert_eq!(container["securityContext"]["readOnlyRootFilesystem"], true);
            assert_eq!(container["securityContext"]["capabilities"]["drop"][0], "ALL");
            assert!(container["securityContext"]["capabilities"]["add"].is_null());
            for host in ["hostNetwork", "hostPID", "hostIPC"] {
                assert!(spec[host].is_null());
            }
            for volume in spec["volumes"].as_array().unwrap() {
                let kind = volume.as_object().unwrap().keys().find(|key| *key != "name").unwrap();
                assert!(
                    ["configMap", "emptyDir", "persistentVolumeClaim", "secret"].contains(&kind.as_str())
                );
            }
            for limit in ["requests", "limits"] {
                assert!(!container["resources"][limit]["memory"].is_null(), "{limit}");
            }
        }
    }
}

/// Runs the production overlay as processes: its Job creates the keys, its pods start as their manifests say, and
/// directories stand in for volumes.
#[tokio::test]
async fn pods_start_as_the_manifests_say() {
    let (database, prefix) = (Database::new().await, Prefix::new().await);
    let cluster = Cluster::new("production", database.url(), prefix.url()).await;
    let listed = std::fs::read_to_string(root().join("k8s/README.md")).unwrap();
    assert!(Cluster::SECRETS.iter().all(|name| listed.contains(name)));
    let start = |pod: &Value| {
        let (setup, command) = cluster.pod(pod);
        (setup.set(&format!("queue.prefix={}", prefix.name())).set("drain.notice=0s"), command)
    };

    let (job, command) = start(&one(&cluster.resources, "Job")["spec"]["template"]);
    let command: Vec<&str> = command.iter().map(String::as_str).collect();
    for _ in 0..2 {
        let ended = job.run(&command).await;
        assert!(ended.status.success(), "{}", String::from_utf8_lossy(&ended.stderr));
    }
    let mut pods = Vec::new();
    let deployment = one(&cluster.resources, "Deployment");
    for _ in 0..2 {
        let (setup, command) = start(&deployment["spec"]["template"]);
        assert!(command.is_empty(), "it serves");
        pods.push(setup.start().await);
    }
    let key = cluster.secret("api.key");
    let mut public_keys = BTreeSet::new();
    for pod in &pods {
        for probe in ["startupProbe", "livenessProbe", "readinessProbe"] {
            let path = &container(&deployment["spec"]["template"])[probe]["httpGet"]["path"];
            assert_eq!(pod.admin().get(path.as_str().unwrap()).await.status, 200);
        }
        let with_key = pod.admin().with_key(cluster.secret("admin.token").trim());
        assert_eq!(with_key.get("/build").await.status, 200, "the admin token is the same for all");
        let client = pod.client().with_key(key.trim());
        assert_eq!(client.get("/notifications").await.status, 200, "and so is the API key");
        public_keys.insert(client.get("/push/key").await.text());
    }
    assert_eq!(public_keys.len(), 1, "and the VAPID key");
    for pod in &mut pods {
        assert_eq!(pod.stop().await, Some(0));
    }
}

#[test]
fn the_image_is_small_and_nobodys() {
    let text = std::fs::read_to_string(root().join("Dockerfile")).unwrap();
    let lines = |word: &str| -> Vec<&str> {
        text.lines().filter_map(|line| line.trim().strip_prefix(word)?.strip_prefix(' ')).collect()
    };
    let stages = lines("FROM");
    let (last, builders) = stages.split_last().unwrap();
    assert!(!builders.is_empty(), "what builds is not in it");
    assert!(last.contains("distroless") && stages.iter().all(|stage| !stage.contains(":latest")));
    assert_eq!(lines("USER"), ["65532:65532"], "as the manifests have it");
    assert_eq!(lines("STOPSIGNAL"), ["SIGTERM"]);
    assert!(
        text.contains(r#"CMD ["/perennial", "health"]"#) && text.contains(r#"ENTRYPOINT ["/perennial"]"#)
    );
    let version = env!("CARGO_PKG_VERSION");
    for name in OVERLAYS {
        for pod in pods(&overlay(name)) {
            assert_eq!(container(pod)["image"], format!("perennial:{version}"));
        }
    }
    // Docker ignores all files that are not listed here, so everything that the build reads must be listed.
    let ignored = std::fs::read_to_string(root().join(".dockerignore")).unwrap();
    for needed in ["Cargo.toml", "Cargo.lock", "app", "server", "workers", "tests", "config"] {
        assert!(ignored.lines().any(|line| line == format!("!{needed}")), "{needed}");
    }
    // The binary may link only to libraries of the base image: the C library, and libgcc of the compiler.
    let linked = Command::new("ldd").arg(binary()).output().unwrap();
    let linked = String::from_utf8_lossy(&linked.stdout).into_owned();
    for library in linked.lines().filter_map(|line| line.split_whitespace().next()) {
        let name = Path::new(library).file_name().unwrap().to_str().unwrap();
        let known =
            ["linux-vdso.so", "libgcc_s.so", "libm.so", "libc.so", "libpthread.so", "libdl.so", "ld-linux"];
        assert!(known.iter().any(|known| name.starts_with(known)), "{linked}");
    }
}

#[test]
fn the_network_policy_blocks_what_the_program_never_sends_to() {
    let policy = include_str!("../../k8s/base/network-policy.yaml");
    let policy: serde_json::Value = serde_yaml_ng::from_str(policy).unwrap();
    let rules = policy["spec"]["egress"].as_array().unwrap();
    let blocks =
        rules.iter().flat_map(|rule| rule["to"].as_array().unwrap()).filter(|to| to["ipBlock"].is_object());
    let excepted = blocks.flat_map(|to| to["ipBlock"]["except"].as_array().unwrap());
    let excepted: std::collections::BTreeSet<String> =
        excepted.map(|network| network.as_str().unwrap().to_owned()).collect();
    let blocked: std::collections::BTreeSet<String> =
        perennial_webpush::not_public().map(|network| network.to_string()).collect();
    assert_eq!(excepted, blocked);
}
