//! The `idefics` binary, under a name of its own: integration tests find it by `CARGO_BIN_EXE_idefics-under-test`.
#![forbid(unsafe_code)]

fn main() -> std::process::ExitCode {
    idefics::main()
}
