//! Compiles the CUDA kernels when the feature `cuda` is on: machine code for every chip that we
//! know, and PTX, which the driver compiles for those to come. Without the feature nothing is
//! done.

use std::path::{Path, PathBuf};
use std::process::Command;

/// Compute capabilities: A100, A10 and their like, L4 and L40, H100 and H200.
const CHIPS: &str = "80,86,89,90";

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    if std::env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    for name in ["NVCC", "CUDA_HOME", "SCONCE_CUDA_CHIPS", "PATH"] {
        println!("cargo:rerun-if-env-changed={name}");
    }
    println!("cargo:rerun-if-changed=src/kernels/cuda");
    let chips = std::env::var("SCONCE_CUDA_CHIPS").unwrap_or_else(|_| CHIPS.to_owned());
    let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets it"));
    let mut command = Command::new(nvcc());
    // Chips side by side, as many as there are cores.
    command.args(["-fatbin", "-std=c++17", "-O3", "-lineinfo", "--threads=0"]);
    let mut chips: Vec<&str> = chips.split(',').map(str::trim).collect();
    // By number: 100 comes after 90.
    chips.sort_unstable_by_key(|chip| (chip.len(), *chip));
    for chip in &chips {
        command.arg(format!("-gencode=arch=compute_{chip},code=sm_{chip}"));
    }
    let oldest = chips.first().expect("at least one chip");
    command.arg(format!("-gencode=arch=compute_{oldest},code=compute_{oldest}"));
    command.arg("-o").arg(out.join("kernels.fatbin")).arg("src/kernels/cuda/kernels.cu");
    let compiled = command.output().unwrap_or_else(|error| {
        panic!("{command:?}: {error}; .ci/cuda-toolchain puts a CUDA compiler together")
    });
    let said = String::from_utf8_lossy(&compiled.stderr);
    assert!(compiled.status.success(), "{command:?}:\n{said}");
}

/// `NVCC`, the compiler of `CUDA_HOME`, that of the usual place, or the one on the path.
fn nvcc() -> PathBuf {
    if let Some(compiler) = std::env::var_os("NVCC") {
        return compiler.into();
    }
    let homes = std::env::var_os("CUDA_HOME").into_iter().map(PathBuf::from);
    let usual = std::iter::once(Path::new("/usr/local/cuda").to_owned());
    let mut places = homes.chain(usual).map(|home| home.join("bin/nvcc"));
    places.find(|place| place.exists()).unwrap_or_else(|| "nvcc".into())
}
