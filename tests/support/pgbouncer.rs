//! PgBouncer with transaction pooling in front of a Postgres of its own.

use std::os::unix::fs::PermissionsExt;
use std::process::Stdio;

use tempfile::TempDir;
use tokio::process::Child;

use crate::postgres::{Server, as_postgres, config};
use crate::{eventually, free_port};

/// A running PgBouncer.
#[derive(Debug)]
pub struct PgBouncer {
    url: String,
    _server: Server,
    _directory: TempDir,
    _child: Child,
}

impl PgBouncer {
    /// Starts PgBouncer and its Postgres. PgBouncer opens fewer connections to the server than its clients want.
    pub async fn start() -> Self {
        let server = Server::start(&["fsync=off", "statement_timeout=10s"]).await;
        let database = server.create().await;
        let (directory, port) = (TempDir::new().unwrap(), free_port());
        let name = database.rsplit('/').next().unwrap();
        let ini = format!(
            "[databases]\n{name} = host=127.0.0.1 port={} user=postgres\n[pgbouncer]\nlisten_addr = 127.0.0.1\n\
             listen_port = {port}\nunix_socket_dir =\nauth_type = any\npool_mode = transaction\n\
             default_pool_size = 3\nmax_client_conn = 100\n",
            server.port()
        );
        let file = directory.path().join("pgbouncer.ini");
        std::fs::write(&file, ini).unwrap();
        std::fs::set_permissions(directory.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
        let mut command = as_postgres("/usr/sbin/pgbouncer".into());
        let child = command.arg("-q").arg(&file).stdout(Stdio::null()).stderr(Stdio::null());
        let child = child.kill_on_drop(true).spawn().unwrap();
        let url = format!("postgres://postgres@127.0.0.1:{port}/{name}");
        let open = || {
            let mut config = config(&url);
            config.pgbouncer = true;
            async { perennial_store::pool::postgres::Postgres::open(config).await.ok() }
        };
        eventually("PgBouncer answers", open).await.close();
        Self { url, _server: server, _directory: directory, _child: child }
    }

    /// URL of PgBouncer, `postgres://..`.
    pub fn url(&self) -> &str {
        &self.url
    }
}
