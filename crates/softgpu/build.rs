//! Names the shared object after the library it stands in for.

fn main() {
    // cudarc looks for `libcuda.so` first. A copy already loaded under that name is taken before any
    // file is searched, so a test may load this library by path and need no LD_LIBRARY_PATH.
    println!("cargo:rustc-cdylib-link-arg=-Wl,-soname,libcuda.so");
    println!("cargo:rerun-if-changed=build.rs");
}
