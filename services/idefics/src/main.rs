//! The `idefics` binary; see the library.

fn main() -> std::process::ExitCode {
    idefics::main()
}
