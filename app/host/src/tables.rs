//! Which tables the migrations of the modules leave behind. Two modules that create the same table would fail at their
//! first start, with an error of the store that names neither.

use std::collections::{BTreeMap, BTreeSet};

use perennial_store::pool::sql::Tables;

/// Returns an error that names both modules, when two modules create the same table.
pub(crate) fn check(all: &[Tables]) -> Result<(), String> {
    for steps in [|tables: &Tables| tables.sqlite, |tables: &Tables| tables.postgres] {
        let mut owners = BTreeMap::new();
        for tables in all {
            for table in created(steps(tables)) {
                if let Some(other) = owners.insert(table.clone(), tables.module) {
                    let module = tables.module;
                    return Err(format!(
                        "the modules {other} and {module} both create the table {table}: rename one of them"
                    ));
                }
            }
        }
    }
    Ok(())
}

/// The tables that exist after these migration steps.
fn created(steps: &[&str]) -> BTreeSet<String> {
    let mut tables = BTreeSet::new();
    for step in steps {
        let words = words(step);
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        for at in 0..words.len() {
            match &words[at..] {
                ["create", "table", "if", "not", "exists", name, ..] | ["create", "table", name, ..] => {
                    tables.insert((*name).to_owned());
                }
                ["alter", "table", from, "rename", "to", to, ..] => {
                    tables.remove(*from);
                    tables.insert((*to).to_owned());
                }
                ["drop", "table", "if", "exists", name, ..] | ["drop", "table", name, ..] => {
                    tables.remove(*name);
                }
                _ => {}
            }
        }
    }
    tables
}

/// The words of a step in small letters, without comments to the end of a line.
fn words(step: &str) -> Vec<String> {
    let code = step.lines().map(|line| line.split("--").next().unwrap_or_default());
    let code = code.collect::<Vec<_>>().join(" ").to_lowercase();
    let is_part = |c: char| c.is_alphanumeric() || c == '_' || c == '.';
    code.split(|c: char| !is_part(c)).filter(|word| !word.is_empty()).map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tables(module: &'static str, sqlite: &'static [&'static str]) -> Tables {
        Tables { module, sqlite, postgres: &[] }
    }

    #[test]
    fn two_modules_that_create_one_table_are_named() {
        let shop = tables(
            "shop",
            &["CREATE TABLE books (id INTEGER)", "CREATE TABLE IF NOT EXISTS \"orders\" (id)"],
        );
        let library = tables("library", &["create table Books(id INTEGER)"]);
        let clash = check(&[shop, library]).unwrap_err();
        assert!(clash.contains("shop and library both create the table books"), "{clash}");
        assert!(check(&[shop, tables("mail", &["CREATE TABLE letters (id)"])]).is_ok());
        assert!(check(&[shop, tables("log", &["-- CREATE TABLE books\nCREATE TABLE lines (id)"])]).is_ok());
    }

    #[test]
    fn a_table_that_was_dropped_or_renamed_is_not_there() {
        let rebuilt: &[&str] = &[
            "CREATE TABLE a (id)",
            "CREATE TABLE new_a (id); INSERT INTO new_a SELECT * FROM a; DROP TABLE a; ALTER TABLE new_a RENAME TO a",
            "CREATE TABLE b (id); DROP TABLE IF EXISTS b",
        ];
        assert_eq!(created(rebuilt), BTreeSet::from(["a".to_owned()]));
    }
}
