//! Locks and semaphores over all replicas: two handles are two replicas.

use std::collections::HashSet;
use std::time::Duration;

use perennial::locks::{Error, Locks, TABLES};
use perennial::runtime::drain::{self, Phase};
use perennial::sql::Store;
use perennial::values;

use crate::sql::stores;

/// Two replicas on one store, and what runs them.
async fn replicas(store: &Store) -> (Locks, Locks, Running) {
    store.migrate(&[TABLES]).await.unwrap();
    let (one, other) = (Locks::new(store.clone()), Locks::new(store.clone()));
    let (trigger, drain) = drain::channel();
    let mut running = tokio::task::JoinSet::new();
    running.spawn(one.clone().run(drain.clone()));
    running.spawn(other.clone().run(drain));
    (one, other, Running { _running: running, _trigger: trigger })
}

struct Running {
    _running: tokio::task::JoinSet<anyhow::Result<()>>,
    _trigger: drain::Trigger,
}

const PATIENCE: Duration = Duration::from_secs(20);

#[tokio::test]
async fn a_lock_has_one_holder_and_each_one_has_a_higher_epoch() {
    for (store, _kept) in stores().await {
        let (one, other, _running) = replicas(&store).await;
        let held = one.try_lock("import").await.unwrap().unwrap();
        assert!(other.try_lock("import").await.unwrap().is_none());
        assert!(one.try_lock("import").await.unwrap().is_none(), "not even the same process");
        assert!(other.try_lock("export").await.unwrap().is_some());
        let waited = other.lock("import", Duration::from_millis(200)).await;
        assert!(matches!(waited, Err(Error::Held(name)) if name == "import"));
        let first = held.epoch();
        held.release().await.unwrap();
        let second = other.try_lock("import").await.unwrap().unwrap();
        assert!(second.epoch() > first);
        drop(second);
        let third = one.lock("import", PATIENCE).await.unwrap();
        assert!(third.epoch() > first + 1, "a guard that drops is released soon");
        assert!(matches!(one.try_lock("").await, Err(Error::Invalid)));
        assert!(matches!(one.semaphore("x", 0).try_acquire().await, Err(Error::Invalid)));
    }
}

#[tokio::test]
async fn a_semaphore_has_so_many_holders_and_a_race_has_no_more() {
    for (store, _kept) in stores().await {
        let (one, other, _running) = replicas(&store).await;
        let tries = (0..40).map(|n| {
            let semaphore = if n % 2 == 0 { &one } else { &other }.semaphore("crawler", 3);
            async move { semaphore.try_acquire().await.unwrap() }
        });
        let guards: Vec<_> = futures_util::future::join_all(tries).await.into_iter().flatten().collect();
        assert!((1..=3).contains(&guards.len()), "{}", guards.len());
        let mut all = guards;
        while all.len() < 3 {
            all.push(one.semaphore("crawler", 3).acquire(PATIENCE).await.unwrap());
        }
        assert!(other.semaphore("crawler", 3).try_acquire().await.unwrap().is_none());
        all.pop().unwrap().release().await.unwrap();
        assert!(other.semaphore("crawler", 3).try_acquire().await.unwrap().is_some());
    }
}

/// A replica that died leaves its lease behind: it ends by itself. A holder that lost it is told.
#[tokio::test]
async fn the_lock_of_a_dead_replica_is_free_again_and_a_holder_that_lost_it_is_told() {
    for (store, _kept) in stores().await {
        let (one, other, _running) = replicas(&store).await;
        let held = one.try_lock("import").await.unwrap().unwrap();
        store.execute("UPDATE locks SET until = 1", values![]).await.unwrap();
        let taken = other.try_lock("import").await.unwrap().unwrap();
        assert!(taken.epoch() > held.epoch());
        tokio::time::timeout(PATIENCE, held.lost()).await.unwrap();
        assert!(held.is_lost() && !taken.is_lost());
        drop(held);
        assert!(one.try_lock("import").await.unwrap().is_none(), "its end takes nothing from the new holder");
    }
}

#[tokio::test]
async fn a_replica_that_stops_gives_up_its_locks() {
    for (store, _kept) in stores().await {
        store.migrate(&[TABLES]).await.unwrap();
        let (one, other) = (Locks::new(store.clone()), Locks::new(store.clone()));
        let (trigger, drain) = drain::channel();
        let mut running = tokio::task::JoinSet::new();
        running.spawn(one.clone().run(drain));
        let _held = one.try_lock("import").await.unwrap().unwrap();
        trigger.advance(Phase::Hard);
        running.join_next().await.unwrap().unwrap().unwrap();
        assert!(other.try_lock("import").await.unwrap().is_some());
    }
}

#[tokio::test]
async fn every_increment_under_a_lock_counts() {
    for (store, _kept) in stores().await {
        let (one, other, _running) = replicas(&store).await;
        store.execute("CREATE TABLE counted (n BIGINT)", values![]).await.unwrap();
        store.execute("INSERT INTO counted VALUES (0)", values![]).await.unwrap();
        let rounds = (0..10).map(|n| {
            let (locks, store) = (if n % 2 == 0 { one.clone() } else { other.clone() }, store.clone());
            async move {
                let guard = locks.lock("count", PATIENCE).await.unwrap();
                let n: i64 = store.value("SELECT n FROM counted", values![]).await.unwrap();
                store.execute("UPDATE counted SET n = ?", values![n + 1]).await.unwrap();
                let epoch = guard.epoch();
                guard.release().await.unwrap();
                epoch
            }
        });
        let epochs: HashSet<i64> = futures_util::future::join_all(rounds).await.into_iter().collect();
        assert_eq!(epochs.len(), 10);
        assert_eq!(store.value::<i64>("SELECT n FROM counted", values![]).await.unwrap(), 10);
    }
}
