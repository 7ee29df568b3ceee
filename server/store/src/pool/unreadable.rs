//! Rows that cannot be read are left out, so that the other rows are still processed.
//!
//! Other programs write into the stores too, and disks get damaged. One row with a text that is not UTF-8, or with a
//! number in the place of a text, must not block the rows that are read with it.

use std::collections::HashSet;
use std::fmt::Display;
use std::sync::LazyLock;

use parking_lot::Mutex;
use tracing::{debug, warn};

use crate::metrics;

/// Number of rows that are remembered as logged. When it is reached, every row is logged again.
const MAX_TOLD: usize = 1024;

/// Reports that the row `name` of `what` is left out because it cannot be read. The same rows are read again and again,
/// so only the first report is a warning, and later ones are for debugging. `perennial_unreadable_rows_total` counts
/// every report.
pub fn set_apart(what: &'static str, name: &str, why: &dyn Display) {
    static TOLD: LazyLock<Mutex<HashSet<(&'static str, String)>>> = LazyLock::new(Mutex::default);
    metrics::unreadable(what);
    let mut told = TOLD.lock();
    if told.len() >= MAX_TOLD {
        told.clear();
    }
    if told.insert((what, name.to_owned())) {
        warn!(what, row = name, why = %why, "a row cannot be read: it is left out, and the other rows are processed");
    } else {
        debug!(what, row = name, why = %why, "a row cannot be read");
    }
}
