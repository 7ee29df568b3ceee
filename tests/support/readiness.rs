//! Readiness of a process.

use crate::process::Perennial;
use crate::{SOON, eventually_within};

/// Answer of `/readyz`: its status, and all reasons joined with `; `.
pub async fn readiness(perennial: &Perennial) -> (u16, String) {
    let answer = perennial.admin().get("/readyz").await;
    let reasons = answer.json()["reasons"].as_array().cloned().unwrap_or_default();
    let reasons: Vec<String> = reasons.iter().map(|reason| reason.as_str().unwrap().to_owned()).collect();
    (answer.status.as_u16(), reasons.join("; "))
}

/// Waits until `/readyz` answers with this status and with this reason among the others; an empty `part`
/// means without reasons.
pub async fn until_ready_says(perennial: &Perennial, status: u16, part: &str) {
    eventually_within(2 * SOON, &format!("/readyz says {status} {part}"), || async {
        let (found, reasons) = readiness(perennial).await;
        (found == status && reasons.contains(part) && reasons.is_empty() == part.is_empty()).then_some(())
    })
    .await;
}
