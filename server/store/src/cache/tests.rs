use std::convert::Infallible;
use std::pin::pin;
use std::sync::atomic::AtomicUsize;

use tokio::sync::{Barrier, Notify};

use super::*;

impl Kept for String {
    fn bytes(&self) -> usize {
        self.len()
    }
}

const CONFIG: Config = Config {
    name: "test",
    bytes: 10_000,
    ttl: Duration::from_secs(30),
    negative_ttl: Duration::from_millis(50),
    stale: Duration::ZERO,
};

async fn get(cache: &Cache<String>, key: &str, value: Option<&str>) -> Option<String> {
    cache.get(key, async { Ok::<_, Infallible>(value.map(str::to_owned)) }).await.unwrap()
}

#[tokio::test]
async fn many_who_ask_at_once_load_once() {
    let (cache, loads) = (Cache::<String>::new(CONFIG), AtomicUsize::new(0));
    let barrier = Barrier::new(2);
    let ask = async || {
        let load = async {
            loads.fetch_add(1, Ordering::Relaxed);
            barrier.wait().await;
            Ok::<_, Infallible>(Some("v".to_owned()))
        };
        cache.get("k", load).await.unwrap()
    };
    let (answers, _) = tokio::join!(join_all((0..50).map(|_| ask())), barrier.wait());
    assert!(answers.iter().all(|answer| answer.as_deref() == Some("v")));
    assert_eq!(loads.into_inner(), 1);
    let status = cache.status();
    assert_eq!((status.misses, status.hits), (1, 49));
}

#[tokio::test]
async fn a_load_that_is_given_up_is_done_by_the_next_who_waits() {
    let cache = Cache::<String>::new(CONFIG);
    let began = Notify::new();
    let stuck = cache.get("k", async {
        began.notify_one();
        std::future::pending::<Result<Option<String>, Infallible>>().await
    });
    let waiting = async {
        began.notified().await;
        get(&cache, "k", Some("v")).await
    };
    // The first one leaves when the second has waited for a moment.
    let mut waiting = pin!(waiting);
    tokio::select! {
        _ = stuck => unreachable!("it never ends"),
        _ = &mut waiting => unreachable!("it waits for the first"),
        () = tokio::time::sleep(Duration::from_millis(20)) => {}
    }
    assert_eq!(waiting.await.as_deref(), Some("v"));
}

#[tokio::test]
async fn what_failed_is_told_to_all_and_tried_again() {
    let cache = Cache::<String>::new(CONFIG);
    let error = cache.get("k", async { Err::<Option<String>, _>("away") }).await.unwrap_err();
    assert_eq!(*error, "away");
    assert_eq!(get(&cache, "k", Some("v")).await.as_deref(), Some("v"));
    assert_eq!(cache.status().failed, 1);
}

#[tokio::test]
async fn what_has_ended_is_given_while_nobody_knows_better() {
    let config = Config { ttl: Duration::from_millis(20), stale: Duration::from_secs(60), ..CONFIG };
    let caches = Caches::default();
    let cache: Cache<String> = caches.make(config);
    assert_eq!(get(&cache, "k", Some("v")).await.as_deref(), Some("v"));
    tokio::time::sleep(config.ttl * 2).await;
    assert!(cache.has("k") && !cache.has("another"), "it was found lately");
    let fail = async || cache.get("k", async { Err::<Option<String>, _>("away") }).await;
    assert_eq!(fail().await.unwrap().as_deref(), Some("v"));
    assert_eq!((cache.status().failed, cache.status().stale), (1, 1));
    assert_eq!(get(&cache, "k", None).await, None, "it is not there any more");
    tokio::time::sleep(CONFIG.negative_ttl * 2).await;
    assert_eq!(*fail().await.unwrap_err(), "away");
    get(&cache, "k", Some("v")).await;
    caches.forget("test", Some("k")).await;
    assert_eq!(*fail().await.unwrap_err(), "away", "what was forgotten is not given");
}

#[tokio::test]
async fn nothing_is_an_answer_for_a_shorter_time() {
    let cache = Cache::<String>::new(CONFIG);
    assert_eq!(get(&cache, "k", None).await, None);
    assert_eq!(get(&cache, "k", Some("v")).await, None);
    tokio::time::sleep(CONFIG.negative_ttl * 2).await;
    assert_eq!(get(&cache, "k", Some("v")).await.as_deref(), Some("v"));
    assert_eq!(get(&cache, "k", None).await.as_deref(), Some("v"));
}

#[tokio::test]
async fn what_is_forgotten_while_it_is_loaded_is_not_kept() {
    let caches = Caches::default();
    let cache: Cache<String> = caches.make(CONFIG);
    let load = async {
        caches.forget("test", Some("k")).await;
        Ok::<_, Infallible>(Some("old".to_owned()))
    };
    assert_eq!(cache.get("k", load).await.unwrap().as_deref(), Some("old"));
    assert_eq!(get(&cache, "k", Some("new")).await.as_deref(), Some("new"));
    assert_eq!(get(&cache, "other", Some("x")).await.as_deref(), Some("x"));
    caches.forget("test", None).await;
    assert_eq!(get(&cache, "other", Some("y")).await.as_deref(), Some("y"));
}

#[test]
fn what_asks_is_small() {
    let cache = Cache::<String>::new(CONFIG);
    let asking = cache.get("k", async { Ok::<_, Infallible>(Some(String::new())) });
    assert!(size_of_val(&asking) < 2048, "{}", size_of_val(&asking));
}

#[tokio::test]
async fn its_size_is_bounded_in_bytes() {
    let cache = Cache::<String>::new(CONFIG);
    for key in 0..1000 {
        get(&cache, &key.to_string(), Some(&"x".repeat(100))).await;
    }
    AnyCache::tidy(&cache).await;
    let status = cache.status();
    assert!(status.bytes <= CONFIG.bytes && status.entries > 0, "{status:?}");
    assert!(status.evicted >= 900, "{status:?}");
}
