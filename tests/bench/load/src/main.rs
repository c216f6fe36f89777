//! The `idefics-load` binary; see the library.

fn main() -> std::process::ExitCode {
    idefics_load::main()
}
