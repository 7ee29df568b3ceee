//! `perennial completions` and `perennial man`: the command line, for shells and for `man`.

use std::path::PathBuf;

use anyhow::Context;
use clap::Args;
use clap_complete::Shell;

use crate::command::print;

#[derive(Args, Debug)]
#[command(after_help = "Examples:
  perennial completions bash > /etc/bash_completion.d/perennial
  perennial completions zsh > \"${fpath[1]}/_perennial\"
  perennial completions fish > ~/.config/fish/completions/perennial.fish")]
pub(super) struct Completions {
    /// Shell that the script is for
    shell: Shell,
}

#[derive(Args, Debug)]
#[command(after_help = "Examples:
  perennial man | man -l -
  perennial man /usr/local/share/man/man1")]
pub(super) struct Man {
    /// Directory for a page per command; by default only the first page is printed, to standard output
    directory: Option<PathBuf>,
}

impl Completions {
    pub(super) fn run(&self, mut command: clap::Command) -> anyhow::Result<()> {
        let mut script = Vec::new();
        let name = command.get_name().to_owned();
        clap_complete::generate(self.shell, &mut command, name, &mut script);
        print(&String::from_utf8(script)?)
    }
}

impl Man {
    pub(super) fn run(&self, command: clap::Command) -> anyhow::Result<()> {
        match &self.directory {
            None => {
                let mut page = Vec::new();
                clap_mangen::Man::new(command).render(&mut page)?;
                print(&String::from_utf8(page)?)
            }
            Some(directory) => std::fs::create_dir_all(directory)
                .and_then(|()| clap_mangen::generate_to(command, directory))
                .with_context(|| format!("the pages cannot be written to {}", directory.display())),
        }
    }
}
