//! Rows that cannot be read: set apart, so that the others go on.
//!
//! Other programs write into the stores too, and disks are damaged. One row with a text that is no UTF-8, or a number where a
//! text should be, must not stop everything that is read together with it.

use std::collections::HashSet;
use std::fmt::Display;
use std::sync::LazyLock;

use parking_lot::Mutex;
use tracing::{debug, warn};

use crate::metrics;

/// How many rows are remembered as told; then all are told again.
const MAX_TOLD: usize = 1024;

/// Notes that the row `name` of `what` is left out, since it cannot be read: once aloud, since the same rows are read again and
/// again, then for debugging only. `perennial_unreadable_rows_total` counts every time.
pub fn set_apart(what: &'static str, name: &str, why: &dyn Display) {
    static TOLD: LazyLock<Mutex<HashSet<(&'static str, String)>>> = LazyLock::new(Mutex::default);
    metrics::unreadable(what);
    let mut told = TOLD.lock();
    if told.len() >= MAX_TOLD {
        told.clear();
    }
    if told.insert((what, name.to_owned())) {
        warn!(what, row = name, why = %why, "a row cannot be read; it is set apart, and the others go on");
    } else {
        debug!(what, row = name, why = %why, "a row cannot be read");
    }
}
