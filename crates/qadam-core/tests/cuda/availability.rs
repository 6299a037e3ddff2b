//! Finding the driver: absent, incomplete, too old, without devices, failing; each in a process of
//! its own.

use std::path::{Path, PathBuf};
use std::process::Command;

use cudarc::driver::sys;
use qadam_core::cuda::{Launcher, availability};

use crate::device::{leaks, soft, use_device};
use crate::model::Model;
use crate::stand_in::Soft;

const CASE: &str = "QADAM_TEST_CASE";

/// Runs case `name` in a child, which finds shared libraries in `folder`.
#[track_caller]
fn run(name: &str, folder: Option<&Path>) {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "availability::child", "--nocapture"]).env(CASE, name);
    if let Some(folder) = folder {
        command.env("LD_LIBRARY_PATH", folder);
    }
    let output = command.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && text.contains("1 passed"), "{name}: {text}{errors}");
}

/// Does nothing unless a test below started it.
#[test]
fn child() {
    match std::env::var(CASE).as_deref() {
        Ok("no driver") => no_driver(),
        Ok("no functions") => no_functions(),
        Ok("no devices") => no_devices(),
        Ok("old driver") => old_driver(),
        Ok("old device") => old_device(),
        Ok("first use") => first_use(),
        Ok("lost context") => lost_context(),
        _ => {}
    }
}

/// Both entrances give the same error.
#[track_caller]
fn unavailable() -> String {
    let text = availability().unwrap_err().to_string();
    assert_eq!(Launcher::new(0).unwrap_err().to_string(), text);
    text
}

#[test]
fn without_a_driver_there_is_a_reason_and_no_panic() {
    run("no driver", None);
}

fn no_driver() {
    // SAFETY: only asks whether a library can be opened.
    if unsafe { sys::is_culib_present() } {
        return; // a machine with a GPU
    }
    let text = "CUDA is not available: the driver's library (libcuda.so.1) was not found";
    assert_eq!(unavailable(), text);
}

#[test]
fn a_driver_without_a_function_is_too_old() {
    let folder = stub();
    run("no functions", Some(&folder));
    std::fs::remove_dir_all(&folder).unwrap();
}

/// A folder with a `libcuda.so` that has two functions.
fn stub() -> PathBuf {
    let folder = std::env::temp_dir().join(format!("qadam-stub-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let source = folder.join("stub.rs");
    let text = "#[unsafe(no_mangle)] pub extern \"C\" fn cuInit(_: u32) -> u32 { 0 }
        #[unsafe(no_mangle)] pub extern \"C\" fn cuDriverGetVersion(_: *mut i32) -> u32 { 0 }";
    std::fs::write(&source, text).unwrap();
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let status = Command::new(rustc)
        .args(["--edition", "2024", "--crate-type", "cdylib", "-o"])
        .arg(folder.join("libcuda.so"))
        .arg(&source)
        .status()
        .unwrap();
    assert!(status.success());
    folder
}

fn no_functions() {
    let text = unavailable();
    assert!(text.contains("the driver has no cuDeviceGet; a driver for CUDA 12.0"), "{text}");
}

#[test]
fn a_driver_without_devices_is_unavailable() {
    run("no devices", None);
}

fn no_devices() {
    Soft::loaded().set_devices(0);
    let text = "CUDA is not available: the driver does not start: CUDA_ERROR_NO_DEVICE (100)";
    assert_eq!(unavailable(), text);
}

#[test]
fn an_old_driver_is_refused() {
    run("old driver", None);
}

fn old_driver() {
    Soft::loaded().set_version(11080);
    let text = unavailable();
    assert!(text.contains("the driver is for CUDA 11.8; one for CUDA 12.0"), "{text}");
}

#[test]
fn an_old_device_is_refused() {
    run("old device", None);
}

fn old_device() {
    Soft::loaded().set_sm(70);
    assert_eq!(availability(), Ok(1));
    let text = Launcher::new(0).unwrap_err().to_string();
    assert!(text.contains("device 0 has compute capability 7.0; 7.5 (Turing)"), "{text}");
}

#[test]
fn what_fails_at_the_first_use_is_tried_again_at_the_next() {
    run("first use", None);
}

fn first_use() {
    let soft = soft();
    for (call, times) in [
        ("cuInit", 1),
        ("cuDriverGetVersion", 1),
        ("cuDeviceGetCount", 2),
        ("cuDeviceGet", 1),
        ("cuDevicePrimaryCtxRetain", 1),
        ("cuDeviceGetAttribute", 2),
        ("cuCtxPushCurrent", 1),
        ("cuModuleLoadDataEx", 1),
        ("cuModuleGetFunction", 2),
    ] {
        for k in 1..=times {
            assert_eq!(soft.fail(call, k, 999), 0);
            let text = Launcher::new(0).unwrap_err().to_string();
            assert!(text.contains("CUDA_ERROR_UNKNOWN (999)"), "{call}: {text}");
            soft.disarm();
        }
    }
    drop(Launcher::new(0).unwrap());
    drop(Launcher::new(0).unwrap());
    let counts = ["cuModuleLoadDataEx", "cuModuleUnload"].map(|call| soft.count(call));
    assert_eq!(counts[0] - counts[1] - 1, 1, "one failed, the others but one were unloaded");
    assert_eq!((soft.leak("modules"), soft.leak("contexts")), (1, 1));
    assert_eq!(leaks(&soft), [0; 8]);
}

#[test]
fn a_lost_context_is_said_to_be_lost() {
    run("lost context", None);
}

fn lost_context() {
    let soft = soft();
    use_device(0);
    let got = Model::small(3).on_device(&soft, 0);
    let mut launcher = Launcher::new(0).unwrap();
    let mut steps = got.model.device_steps();
    steps[1].grad = 0x10; // no memory at all
    // SAFETY: it is not, which the stand-in survives.
    let first = unsafe { launcher.step(&steps, 0) };
    assert_eq!(first, Ok(()), "as on a GPU, the next call tells");
    // SAFETY: refused.
    let text = unsafe { launcher.step(&steps, 0) }.unwrap_err().to_string();
    assert_eq!(
        text,
        "CUDA_ERROR_ILLEGAL_ADDRESS (700) while asking whether the stream is being captured on \
         device 0; this process can no longer use the device: start a new one"
    );
    assert!(Launcher::new(0).is_err());
    assert_eq!(availability(), Ok(2));
    drop(launcher);
}
