# What developers and CI do, each under one name. `just` lists them.

default:
    @just --list

# the unit tests of one crate: seconds, no servers. just unit webpush, push, host, workers, store, runtime, server, heap
unit CRATE *FILTER:
    cargo nextest run --package perennial-{{ CRATE }} --lib {{ FILTER }}

# integration tests whose names contain FILTER, with only the servers that they need
test *FILTER:
    tests/run {{ FILTER }}

# everything, in the long versions
full:
    tests/run --full

# formatting, lints and documentation, as CI has them
lint:
    cargo fmt --all --check
    cargo clippy --workspace --all-targets -- -D warnings
    RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps --document-private-items --quiet

# exactly what CI runs
ci:
    .ci/run

# a trial on this machine: a server, a push service and imaginary browsers
dev *ARGUMENTS:
    cargo run -- serve --dev {{ ARGUMENTS }}

# the pages of docs/ as a book in target/book; it takes mdBook
book *ARGUMENTS:
    docs/book {{ ARGUMENTS }}

# the references of the settings and of the HTTP interface in docs/, from the program
references:
    cargo build --bin perennial
    PERENNIAL_WRITE_REFERENCES=1 cargo nextest run --package perennial-tests --test operations references::

# the benches beside their peers
bench *NAME:
    tests/bench/run {{ NAME }}

# the binary as it is shipped: optimized across crates, its symbols apart in target/dist/perennial.debug
dist:
    cargo build --profile dist --locked --bin perennial
    objcopy --only-keep-debug target/dist/perennial target/dist/perennial.debug
    objcopy --strip-all --add-gnu-debuglink=target/dist/perennial.debug target/dist/perennial
