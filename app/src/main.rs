//! The binary: Perennial, hosting web push.

use std::process::ExitCode;

use mimalloc::MiMalloc;
use perennial::Perennial;
use perennial::push::Push;

#[global_allocator]
static ALLOCATOR: MiMalloc = MiMalloc;

fn main() -> ExitCode {
    Perennial::new().host::<Push>().main()
}
