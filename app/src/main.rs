//! The binary: Perennial, hosting web push.

use std::process::ExitCode;

use perennial::Perennial;
use perennial::push::Push;

fn main() -> ExitCode {
    Perennial::new().host::<Push>().main()
}
