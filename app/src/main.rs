//! The binary: Perennial, hosting web push.

use std::process::ExitCode;

use perennial::Perennial;

fn main() -> ExitCode {
    let program = Perennial::new();
    #[cfg(feature = "push")]
    let program = program.host::<perennial::push::Push>();
    program.main()
}
