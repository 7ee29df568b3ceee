//! After kill -9, every member is reached, repeats stay within the bound of the checkpoint, and the sums are right.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use nix::sys::signal::Signal;
use perennial::sink::{Answer, Push};
use serde_json::{Value, json};

use support::double::Double;
use support::eventually;
use support::process::{Perennial, Setup};

#[tokio::test]
async fn a_kill_in_the_middle_of_a_broadcast_loses_nobody() {
    let (audience, kills) = if support::full() { (50_000, 10) } else { (5_000, 2) };
    let double = Double::start().await;
    let mut perennial = Setup::new().sending_to(&double).set("push.checkpoint.sends=50").start().await;
    perennial.fill((0..audience).map(|_| double.mint()));
    let id = perennial.notify(&json!({ "to": {"all": true}, "notification": {"title": "Hello"} })).await;
    for kill in 1..=kills {
        let until = audience * kill / (kills + 1);
        eventually("some were sent", || async { (double.taken().len() >= until).then_some(()) }).await;
        perennial = perennial.kill_and_start_again().await;
    }
    let progress = perennial.done_within(&id, Duration::from_secs(600)).await;
    let (reached, repeats) = double.reached_and_repeats();
    println!("{audience} subscribers, {kills} kills: {reached} reached, {repeats} repeats");
    assert_eq!(reached, audience, "everybody got it");
    // At each kill, `push.batches` batches were in flight, each with at most
    // `push.checkpoint.sends` sends not recorded.
    assert!(repeats <= kills * 4 * 50, "{repeats} repeats");
    assert_eq!(progress["outcomes"], json!({ "delivered": audience }));
    assert_eq!(progress["audience"].as_u64(), Some(audience as u64));
    assert!(double.refused().is_empty(), "{:?}", double.refused());
}

#[tokio::test]
async fn an_accepted_notification_survives_a_kill_at_once() {
    let double = Double::start().await;
    let perennial = Setup::new().sending_to(&double).start().await;
    perennial.subscribe(&double, 3).await;
    let id = perennial.notify(&json!({ "to": {"all": true}, "notification": {"title": "Hello"} })).await;
    let perennial = perennial.kill_and_start_again().await;
    let progress = perennial.done(&id).await;
    assert_eq!(progress["outcomes"], json!({ "delivered": 3 }));
    assert_eq!(double.reached_and_repeats().0, 3);
}

#[tokio::test]
async fn a_killed_process_leaves_no_lock_behind() {
    let mut perennial = Setup::new().start().await;
    for _ in 0..3 {
        perennial.signal(Signal::SIGKILL);
        perennial.ended().await;
        perennial = perennial.start_again().await;
    }
    assert_eq!(perennial.stop().await, Some(0));
}

#[tokio::test]
async fn a_notification_that_kills_its_process_every_time_ends_some_time() {
    let double = Double::start().await;
    let perennial = Setup::new().sending_to(&double).start().await;
    perennial.subscribe(&double, 2).await;
    double.script(|_| Answer::Stall);
    let (kills, progress) = kill_whenever_it_stalls(perennial, &double, |_| true).await;
    assert_eq!(progress["outcomes"], json!({ "failed": 2 }));
    assert!(kills >= 4, "a crash may be somebody else's: {kills}");
}

/// A member that crashes the process is found and left out, whatever the cause is, and the others get their messages.
#[tokio::test]
async fn the_one_member_that_kills_its_process_is_found() {
    let double = Double::start().await;
    let perennial = Setup::new().sending_to(&double).start().await;
    perennial.subscribe(&double, 3).await;
    let poison = double.mint();
    perennial.client().post("/subscriptions", &json!({ "subscription": poison })).await;
    perennial.subscribe(&double, 3).await;
    let endpoint = poison["endpoint"].as_str().unwrap().to_owned();
    let is_poison = move |push: &Push| endpoint.ends_with(&push.token);
    let stalled = Arc::new(AtomicUsize::new(0));
    double.script({
        let stalled = Arc::clone(&stalled);
        move |push| {
            if !is_poison(push) {
                return Answer::Take;
            }
            stalled.fetch_add(1, Ordering::SeqCst);
            Answer::Stall
        }
    });
    let seen = AtomicUsize::new(0);
    let is_stalled = |_: &Double| {
        let now = stalled.load(Ordering::SeqCst);
        seen.swap(now, Ordering::SeqCst) < now
    };
    let (kills, progress) = kill_whenever_it_stalls(perennial, &double, is_stalled).await;
    assert_eq!(progress["outcomes"], json!({ "delivered": 6, "failed": 1 }), "after {kills} kills");
    assert_eq!(double.reached_and_repeats().0, 6);
}

/// Sends to all, and kills the process whenever it stalls in a send. Returns the number of kills
/// and the final progress.
async fn kill_whenever_it_stalls(
    mut perennial: Perennial,
    double: &Double,
    is_stalled: impl Fn(&Double) -> bool,
) -> (usize, Value) {
    let id = perennial.notify(&json!({ "to": {"all": true}, "notification": {"title": "Hello"} })).await;
    let (mut kills, mut asked) = (0, 0);
    loop {
        let ended = eventually("it is sent again, or given up", || async {
            let progress = perennial.client().get(&format!("/notifications/{id}")).await.json();
            let done = progress["state"] == "done";
            let again = double.asked() > asked && is_stalled(double);
            (done || again).then_some(done.then_some(progress))
        })
        .await;
        if let Some(progress) = ended {
            return (kills, progress);
        }
        kills += 1;
        assert!(kills < 30, "it goes on for ever");
        asked = double.asked();
        perennial = perennial.kill_and_start_again().await;
    }
}
