set positional-arguments

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

# Measure the engines alone: just engine-bench --model DIR --decode 1x512,8x512
engine-bench *ARGS:
    cargo run --release -p idefics-engine-bench -- {{ARGS}}

# Build what the acceptance on a machine with a card needs there: tests/gpu/README.md.
gpu-build:
    tests/gpu/build.sh

# Builds what stands in for driver, NVRTC and cuBLASLt.
[private]
emulation:
    kernels/cu/host/build target/emulation

# Run the binary with the CUDA backend on the host emulation: just emulate ask --image tests/golden/demo/pictures/03.png "Read the sign."
emulate +ARGS: emulation
    cargo build --release
    LD_LIBRARY_PATH=target/emulation IDEFICS_BACKEND__DEVICE=cuda:0 target/release/idefics "$@"

# Compile the CUDA kernels for every architecture and run their tests on the host emulation.
kernels:
    bash .ci/kernels
