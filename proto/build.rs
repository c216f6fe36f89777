//! Compiles the `.proto` files with protox, a protoc in pure Rust, so that nothing has to be installed.

use std::{env, fs, path::PathBuf};

const FILES: [&str; 4] = [
    "idefics/tensor/v1/tensor.proto",
    "idefics/gateway/v1/gateway.proto",
    "idefics/vision/v1/vision.proto",
    "idefics/decoder/v1/decoder.proto",
];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=idefics");
    let mut compiler = protox::Compiler::new(["."])?;
    compiler.include_source_info(true).include_imports(true);
    for file in FILES {
        compiler.open_file(file)?;
    }
    let out = PathBuf::from(env::var("OUT_DIR")?);
    fs::write(out.join("descriptors.bin"), compiler.encode_file_descriptor_set())?;
    // Every `bytes` field becomes `bytes::Bytes`: image tokens are megabytes and must not be copied.
    tonic_prost_build::configure().bytes(".").compile_fds(compiler.file_descriptor_set())?;
    Ok(())
}
