# `just check` is what CI runs.
check:
    bash .ci/run

# Format everything.
fmt:
    cargo fmt --all

# Every test, in parallel processes (needs cargo-nextest).
test:
    cargo nextest run --workspace

# What the CPU kernels reach beside this machine's ceilings.
bench *ARGS:
    cargo bench -p idefics-kernels -- {{ARGS}}

# Licences, sources and duplicate crates (needs cargo-deny).
deny:
    cargo deny check bans licenses sources

# Ask the demo checkpoint: just ask tests/golden/demo/pictures/03.png "Read the sign."
ask IMAGE QUESTION:
    cargo run --release -- ask --image {{IMAGE}} "{{QUESTION}}"

# Put load on a deployment: just load sweep --bin target/release/idefics
load *ARGS:
    cargo run --release -p idefics-load -- {{ARGS}}
