//! A rollout under load: the test plays the kubelet and the endpoint controller, from the manifests as they are.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{Method, StatusCode};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use tokio::task::JoinSet;

use support::double::Double;
use support::haproxy::Haproxy;
use support::http::Client;
use support::kubernetes::{Cluster, container, one};
use support::postgres::Database;
use support::process::{Perennial, Setup, example};
use support::redis::Prefix;
use support::schedules::{ended, runs, second};
use support::{eventually, full};

/// A version that is rolled out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Version {
    /// This version.
    This,
    /// A version with one more migration step.
    Next,
}

const REPLICAS: usize = 3;
/// Number of clients that send requests at the same time.
const CLIENTS: usize = 4;

/// A running pod, and its slot in the load balancer.
struct Pod {
    process: Perennial,
    slot: usize,
}

/// Control plane of the test, with the servers that its pods use.
struct ControlPlane {
    cluster: Cluster,
    haproxy: Arc<Haproxy>,
    double: Arc<Double>,
    prefix: String,
    slots: usize,
}

impl ControlPlane {
    fn template(&self) -> &Value {
        &one(&self.cluster.resources, "Deployment")["spec"]["template"]
    }

    /// Adds settings that no manifest has: the push service of the test, and a schedule to watch.
    fn setup(&self, setup: Setup) -> Setup {
        setup
            .sending_to(&self.double)
            .set(&format!("queue.prefix={}", self.prefix))
            .set("cron.schedules=[{ name = 'second', expression = '* * * * * *', job = 'jobs.retention', misfire = 'catch_up' }]")
    }

    /// Starts a pod, probes it as its manifest says, and adds it to the load balancer when it is ready.
    async fn start(&mut self, version: Version) -> Pod {
        let (setup, command) = self.cluster.pod(self.template());
        assert!(command.is_empty());
        let setup = match version {
            Version::This => setup,
            Version::Next => setup.program(example("next")),
        };
        let setup = self.setup(setup);
        let mut process = setup.spawn();
        process.ready().await;
        let container = container(self.template());
        for probe in ["startupProbe", "readinessProbe"] {
            let path = container[probe]["httpGet"]["path"].as_str().unwrap();
            let period = container[probe]["periodSeconds"].as_u64().unwrap();
            while process.admin().get(path).await.status != 200 {
                tokio::time::sleep(Duration::from_secs(period)).await;
            }
        }
        self.slots += 1;
        let port = process.client().base().rsplit_once(':').unwrap().1.parse().unwrap();
        self.haproxy.add(self.slots, port).await;
        Pod { process, slot: self.slots }
    }

    /// Deletes a pod: SIGTERM at once, removal of its endpoint a moment later, and a failure of the test when the
    /// grace period is over. The task returns the log of the pod.
    fn delete(&self, mut pod: Pod, deleted: &mut JoinSet<String>) {
        let grace = self.template()["spec"]["terminationGracePeriodSeconds"].as_u64().unwrap();
        let haproxy = Arc::clone(&self.haproxy);
        deleted.spawn(async move {
            pod.process.signal(Signal::SIGTERM);
            tokio::time::sleep(Duration::from_millis(fastrand::u64(1000..3000))).await;
            haproxy.remove(pod.slot).await;
            let ended = tokio::time::timeout(Duration::from_secs(grace), pod.process.ended()).await;
            let ended = ended.unwrap_or_else(|_| panic!("it was killed: {}", pod.process.log()));
            assert_eq!(ended.code(), Some(0), "{}", pod.process.log());
            pod.process.log()
        });
    }
}

/// Results of the requests of a client.
#[derive(Debug, Default)]
struct Seen {
    requests: usize,
    failed: Vec<String>,
    accepted: Vec<String>,
}

/// Sends notifications and lists them, one request after the other, until `stop` is set.
async fn client(base: String, key: String, stop: Arc<AtomicBool>) -> Seen {
    let client = Client::new(&base).with_key(&key);
    let mut seen = Seen::default();
    while !stop.load(Ordering::Relaxed) {
        seen.requests += 1;
        let is_sending = seen.requests % 4 == 0;
        let request = json!({ "to": { "all": true }, "payload": "hello" });
        let answer = if is_sending {
            let body = Bytes::from(request.to_string());
            client.try_send(Method::POST, "/notify", Some("application/json"), body).await
        } else {
            client.try_send(Method::GET, "/notifications?limit=1", None, Bytes::new()).await
        };
        match answer {
            Ok(answer) if answer.status == StatusCode::ACCEPTED => {
                seen.accepted.push(answer.json()["id"].as_str().unwrap().to_owned());
            }
            Ok(answer) if answer.status == StatusCode::OK => {}
            Ok(answer) => seen.failed.push(format!("{} {}", answer.status, answer.text())),
            Err(error) => seen.failed.push(format!("{error:#}")),
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    seen
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rollout_under_load_fails_no_request_and_loses_nothing() {
    use Version::{Next, This};
    // The rollout goes to a version that changes the tables. The long version of the test also goes back, and
    // between versions with the same tables.
    let rollouts: &[Version] = if full() { &[This, Next, Next, This, This] } else { &[Next] };
    let (double, database, prefix) = (Double::start().await, Database::new().await, Prefix::new().await);
    let mut plane = ControlPlane {
        cluster: Cluster::new("production", database.url(), prefix.url()).await,
        haproxy: Arc::new(Haproxy::start().await),
        double: Arc::new(double),
        prefix: prefix.name().to_owned(),
        slots: 0,
    };
    let (job, command) = plane.cluster.pod(&one(&plane.cluster.resources, "Job")["spec"]["template"]);
    let command: Vec<&str> = command.iter().map(String::as_str).collect();
    let made = plane.setup(job).run(&command).await;
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    let mut pods = Vec::new();
    for _ in 0..REPLICAS {
        pods.push(plane.start(This).await);
    }
    let base = format!("http://127.0.0.1:{}", plane.haproxy.port);
    let key = plane.cluster.secret("api.key").trim().to_owned();
    let through = Client::new(&base).with_key(&key);
    for _ in 0..3 {
        let subscription = json!({ "subscription": plane.double.mint() });
        assert_eq!(through.post("/subscriptions", &subscription).await.status, 201);
    }

    let stop = Arc::new(AtomicBool::new(false));
    let mut clients = JoinSet::new();
    for _ in 0..CLIENTS {
        clients.spawn(client(base.clone(), key.clone(), Arc::clone(&stop)));
    }
    let strategy = &one(&plane.cluster.resources, "Deployment")["spec"];
    assert_eq!(strategy["strategy"]["rollingUpdate"], json!({ "maxUnavailable": 0, "maxSurge": 1 }));
    let min_ready = Duration::from_secs(strategy["minReadySeconds"].as_u64().unwrap());
    let (began, mut deleted) = (Instant::now(), JoinSet::new());
    for version in rollouts {
        for _ in 0..REPLICAS {
            // There is one pod more than wanted, until an old one is deleted.
            let new = plane.start(*version).await;
            tokio::time::sleep(min_ready).await;
            pods.push(new);
            plane.delete(pods.remove(0), &mut deleted);
        }
    }
    let mut logs = deleted.join_all().await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    stop.store(true, Ordering::Relaxed);
    let took = began.elapsed();
    let seen = clients.join_all().await;

    let failed: Vec<&String> = seen.iter().flat_map(|seen| &seen.failed).collect();
    let requests: usize = seen.iter().map(|seen| seen.requests).sum();
    assert!(
        failed.is_empty(),
        "{} of {requests} requests failed: {:?}",
        failed.len(),
        &failed[..failed.len().min(5)]
    );
    let accepted: Vec<&String> = seen.iter().flat_map(|seen| &seen.accepted).collect();
    for id in &accepted {
        let progress = ended_notification(&pods[0].process, &key, id).await;
        assert_eq!(progress["outcomes"], json!({ "delivered": 3 }), "{progress}");
    }
    let newest = runs(&pods[0].process, "second").await;
    let seconds: Vec<i64> = newest.iter().rev().map(second).collect();
    assert!(seconds.windows(2).all(|two| two[1] == two[0] + 1), "each time once: {seconds:?}");
    logs.extend(pods.iter().map(|pod| pod.process.log()));
    let done = ended(&logs, "second");
    assert_eq!(done.iter().collect::<BTreeSet<_>>().len(), done.len(), "and its job once");
    println!(
        "rollouts {rollouts:?} of {REPLICAS} pods in {:.0} s: {requests} requests, none failed; {} notifications accepted \
         and delivered; {} times of a schedule, each once",
        took.as_secs_f64(),
        accepted.len(),
        done.len(),
    );
}

/// Final progress of a notification.
async fn ended_notification(pod: &Perennial, key: &str, id: &str) -> Value {
    let client = pod.client().with_key(key);
    eventually("it is done", || async {
        let progress = client.get(&format!("/notifications/{id}")).await.json();
        (progress["state"] == "done").then_some(progress)
    })
    .await
}
