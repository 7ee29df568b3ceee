//! `perennial new`: a project of an application, which builds, runs and is tested.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use clap::{Args, ValueEnum};

use crate::command::output::done;

/// The files of a project, by their paths.
const FILES: [(&str, &str); 14] = [
    ("Cargo.toml", include_str!("../../template/Cargo.toml.txt")),
    ("src/main.rs", include_str!("../../template/src/main.rs.txt")),
    ("src/lib.rs", include_str!("../../template/src/lib.rs.txt")),
    ("src/notes.rs", include_str!("../../template/src/notes.rs.txt")),
    ("src/page.rs", include_str!("../../template/src/page.rs.txt")),
    ("page/style.css", include_str!("../../template/page/style.css")),
    ("tests/program.rs", include_str!("../../template/tests/program.rs.txt")),
    ("README.md", include_str!("../../template/README.md")),
    ("Dockerfile", include_str!("../../template/Dockerfile")),
    ("k8s/{{name}}.yaml", include_str!("../../template/k8s/program.yaml")),
    (".github/workflows/ci.yml", include_str!("../../template/github/workflows/ci.yml")),
    ("rustfmt.toml", include_str!("../../template/rustfmt.toml")),
    (".dockerignore", include_str!("../../template/dockerignore.txt")),
    (".gitignore", include_str!("../../template/gitignore.txt")),
];

/// Said of a project whose dependency is a directory of this machine.
const PATH_NOTE: &str = "Its dependency on perennial is a directory of this machine. For an image and for CI, make it one that they reach too: git = \"..\" in Cargo.toml.\n";

/// The package `perennial` in the sources that this program was built from.
const SOURCE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/..");

#[derive(Args, Debug)]
#[command(after_help = "Examples:
  perennial new bookshop
  perennial new bookshop --with push --perennial ../perennial/app")]
pub(super) struct New {
    /// Directory of the project, which must not exist; its last part is the name
    directory: PathBuf,
    /// Hosts another module beside the one of the application
    #[arg(long)]
    with: Vec<With>,
    /// The package `perennial`: its directory (app/ of the repository), or its version
    #[arg(long, value_name = "DIRECTORY|VERSION")]
    perennial: Option<String>,
}

/// A module that a project may host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum With {
    /// Web push: subscriptions, `POST /notify`, and push from the code
    Push,
}

impl New {
    /// Writes the files of the project.
    pub(super) fn run(&self, json: bool) -> anyhow::Result<()> {
        let name = self.directory.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        check_name(name)?;
        if self.directory.exists() {
            bail!("{} exists already: wanted a new directory", self.directory.display());
        }
        let template = ProjectTemplate {
            name,
            has_push: self.with.contains(&With::Push),
            perennial: dependency(self.perennial.as_deref())?,
        };
        for (path, text) in FILES {
            let path = self.directory.join(template.fill(path));
            let parent = path.parent().unwrap_or(&self.directory);
            let written = fs::create_dir_all(parent).and_then(|()| fs::write(&path, template.fill(text)));
            written.with_context(|| format!("{} cannot be written", path.display()))?;
        }
        let directory = self.directory.display();
        let words = format!(
            "{directory} is made. Next:\n  cd {directory}\n  cargo run     starts it\n  cargo test    tests it\n{}",
            if template.perennial.starts_with("path") { PATH_NOTE } else { "" }
        );
        done(json, &serde_json::json!({ "directory": self.directory }), &words)
    }
}

/// Names that are keywords of Rust, or packages that a project uses.
const TAKEN: [&str; 46] = [
    "abstract",
    "as",
    "async",
    "await",
    "become",
    "box",
    "break",
    "const",
    "continue",
    "core",
    "crate",
    "do",
    "dyn",
    "else",
    "enum",
    "extern",
    "final",
    "fn",
    "for",
    "gen",
    "if",
    "impl",
    "in",
    "let",
    "loop",
    "macro",
    "match",
    "maud",
    "mod",
    "move",
    "perennial",
    "pub",
    "ref",
    "return",
    "serde",
    "static",
    "std",
    "struct",
    "test",
    "tokio",
    "trait",
    "try",
    "type",
    "use",
    "where",
    "while",
];

/// Checks the name of a package: it is also the name of the program and of its tables.
fn check_name(name: &str) -> anyhow::Result<()> {
    let is_name = name.starts_with(|c: char| c.is_ascii_lowercase())
        && name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-')
        && name.len() <= 40;
    let is_taken = TAKEN.contains(&name);
    if !is_name || is_taken {
        bail!("{name:?}: wanted a name of small letters, digits and hyphens, which begins with a letter");
    }
    Ok(())
}

/// The dependency on the package `perennial`, as it stands in `Cargo.toml`.
fn dependency(given: Option<&str>) -> anyhow::Result<String> {
    let path = |directory: &Path| {
        let found =
            directory.canonicalize().with_context(|| format!("{} is not there", directory.display()))?;
        if !found.join("Cargo.toml").exists() {
            bail!("{}: wanted the directory app/ of the repository", directory.display());
        }
        Ok(format!("path = {}", toml::Value::from(found.to_string_lossy().into_owned())))
    };
    match given {
        Some(version) if version.starts_with(|c: char| c.is_ascii_digit()) => {
            Ok(format!("version = \"{version}\""))
        }
        Some(directory) => path(Path::new(directory)),
        None => path(Path::new(SOURCE))
            .context("the sources of Perennial are not on this machine: name them with --perennial"),
    }
}

/// What the files of a project are filled with.
struct ProjectTemplate<'a> {
    name: &'a str,
    has_push: bool,
    perennial: String,
}

impl ProjectTemplate<'_> {
    /// Fills a text, and leaves out the parts that are not wanted.
    fn fill(&self, text: &str) -> String {
        let mut filled = String::with_capacity(text.len());
        let mut is_wanted = true;
        for line in text.split_inclusive('\n') {
            match line.trim_end() {
                "#[push]" => is_wanted = self.has_push,
                "#[!push]" => is_wanted = !self.has_push,
                "#[/push]" | "#[/!push]" => is_wanted = true,
                _ if is_wanted => filled.push_str(line),
                _ => {}
            }
        }
        let crate_name = self.name.replace('-', "_");
        let features =
            |all: &[&str]| all.iter().map(|name| format!("\"{name}\"")).collect::<Vec<_>>().join(", ");
        let (used, tested): (&[&str], &[&str]) = match self.has_push {
            true => (&["push", "reference"], &["push", "testing"]),
            false => (&["reference"], &["testing"]),
        };
        filled
            .replace("{{name}}", self.name)
            .replace("{{crate}}", &crate_name)
            .replace("{{PREFIX}}", &crate_name.to_uppercase())
            .replace("{{perennial}}", &self.perennial)
            .replace("{{features}}", &features(used))
            .replace("{{testing}}", &features(tested))
    }
}
