#!/usr/bin/env bash
# Builds into target/gpu/ what tests/gpu/run.sh needs on the machine with the card, which need not have a Rust toolchain. An error if it
# is too large to be carried there with the tracked files.
set -euo pipefail
MOST_MIB=64
cd "$(dirname "$0")/../.."

cargo build --release --locked -p idefics -p idefics-load -p idefics-engine-bench
# The program of a crate's tests.
tests() {
    cargo test --release --locked -p "$1" --test "$2" --no-run --message-format=json |
        python3 -c 'import json, sys; print(*(m["executable"] for m in map(json.loads, sys.stdin) if m.get("executable") and m["target"]["name"] == sys.argv[1]))' "$2"
}
cuda_tests=$(tests idefics-kernels cuda)
engine_tests=$(tests idefics-decoder engine_cuda)

mkdir -p target/gpu
for binary in idefics idefics-load idefics-engine-bench; do
    strip -o "target/gpu/$binary" "target/release/$binary"
done
strip -o target/gpu/cuda-tests "$cuda_tests"
strip -o target/gpu/cuda-engine-tests "$engine_tests"

du -sh --apparent-size target/gpu/*
tracked=$(git ls-files -z | du --files0-from=- -c --apparent-size -b | tail -1 | cut -f1)
built=$(du -s --apparent-size -b target/gpu | cut -f1)
echo "target/gpu $((built >> 20)) MiB, tracked files $((tracked >> 20)) MiB, together $(((built + tracked) >> 20)) MiB"
if [ $((built + tracked)) -gt $((MOST_MIB << 20)) ]; then
    echo "target/gpu and the tracked files are larger than $MOST_MIB MiB together: make the binaries smaller, or remove what else is in target/gpu" >&2
    exit 1
fi
