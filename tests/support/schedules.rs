//! Runs of schedules.

use jiff::Timestamp;
use serde_json::Value;

use crate::process::Perennial;

/// The newest runs of a schedule, newest first.
pub async fn runs(perennial: &Perennial, name: &str) -> Vec<Value> {
    let answer = perennial.admin().get(&format!("/schedules/{name}/runs?limit=100")).await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    answer.json().as_array().unwrap().clone()
}

/// Time of the occurrence that a run is for, in seconds since 1970.
pub fn second(run: &Value) -> i64 {
    run["occurrence"]["utc"].as_str().unwrap().parse::<Timestamp>().unwrap().as_second()
}

/// Occurrences of a schedule whose jobs have ended and were settled, according to the logs of these processes.
pub fn ended(logs: &[String], name: &str) -> Vec<String> {
    let of = format!("cron:{name}@");
    let lines = logs.iter().flat_map(|log| log.lines()).filter_map(|line| serde_json::from_str(line).ok());
    let ended = lines.filter(|line: &Value| line["message"] == "job ended" && line["settled"] == true);
    ended.filter_map(|line| line["span"]["trace"].as_str()?.strip_prefix(&of).map(str::to_owned)).collect()
}
