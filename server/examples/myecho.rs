//! An echo daemon: it sends back every byte that it receives.
//!
//! ```sh
//! cargo run --release --package perennial-server --example myecho -- 127.0.0.1:7007
//! ```
//!
//! A forking daemon needs a process for this, and a poll loop a state machine; here it is three lines. The limits, the
//! deadlines and the drain come from `perennial_server`.

use std::io;
use std::time::Duration;

use perennial_runtime::drain::{self, Drain, Phase};
use perennial_runtime::signal::Signals;
use perennial_runtime::tasks::Tasks;
use perennial_server::net::{Config, Inherited, Timeouts};
use perennial_server::tcp::{Server, Stream, TcpHandler};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

struct Echo;

impl TcpHandler for Echo {
    async fn serve(&self, mut stream: Stream, _drain: Drain) -> io::Result<()> {
        let mut buffer = [0; 1024];
        loop {
            match stream.read(&mut buffer).await? {
                0 => return Ok(()),
                length => stream.write_all(&buffer[..length]).await?,
            }
        }
    }
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let listen = std::env::args().nth(1).unwrap_or_else(|| "127.0.0.1:7007".to_owned());
    let listen = listen.parse().map_err(|error: perennial_server::net::NoListen| error.to_string())?;
    let mut signals = Signals::install()?;

    let mut config = Config::new("echo", vec![listen]);
    // A client may be silent for a minute.
    config.timeouts = Timeouts { idle: Duration::from_secs(60), ..config.timeouts };
    let server = Server::bind(config, &Inherited::default()).await?;
    println!("{}", server.addresses().join(" "));

    let (trigger, drain) = drain::channel();
    let tasks = Tasks::new(drain.clone());
    tasks.critical("echo", server.run(Echo, drain));
    signals.next().await;
    trigger.advance(Phase::Soft);
    if tokio::time::timeout(Duration::from_secs(5), tasks.ended()).await.is_err() {
        trigger.advance(Phase::Hard);
        tasks.ended().await;
    }
    Ok(())
}
