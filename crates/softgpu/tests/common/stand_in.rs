//! Loads the stand-in library under cudarc's nose and talks to its control symbols.
#![allow(dead_code)] // each test file uses what it needs

use std::ffi::{CString, c_char, c_void};
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

/// The cdylib cargo built beside this test.
pub fn library() -> PathBuf {
    let exe = std::env::current_exe().unwrap();
    let deps = exe.parent().unwrap();
    [deps.join("libsoftgpu.so"), deps.parent().unwrap().join("libsoftgpu.so")]
        .into_iter()
        .find(|p| p.exists())
        .expect("libsoftgpu.so beside the tests")
}

/// The loaded library. One test at a time: its state is global.
pub struct Soft {
    lib: *mut c_void,
    _one: MutexGuard<'static, ()>,
}

impl Soft {
    /// Loads (once) and resets.
    pub fn fresh() -> Soft {
        let s = Soft::loaded();
        // SAFETY: the signature is the one control.rs gives.
        unsafe { s.symbol::<extern "C" fn()>("softgpu_reset")() };
        s
    }

    /// Loads (once); contexts and settings stay as they were.
    pub fn loaded() -> Soft {
        static ONE: Mutex<()> = Mutex::new(());
        static LIB: OnceLock<usize> = OnceLock::new();
        let one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
        let lib = *LIB.get_or_init(|| {
            let path = CString::new(library().to_str().unwrap()).unwrap();
            // SAFETY: the library's initialisers do nothing but what Rust's runtime does.
            let h = unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_NOW | libc::RTLD_GLOBAL) };
            assert!(!h.is_null());
            h as usize
        });
        Soft { lib: lib as *mut c_void, _one: one }
    }

    /// A function of the library.
    ///
    /// # Safety
    /// `F` is that function's type.
    pub unsafe fn symbol<F: Copy>(&self, name: &str) -> F {
        assert_eq!(size_of::<F>(), size_of::<*mut c_void>());
        let c = CString::new(name).unwrap();
        // SAFETY: `lib` is an open library.
        let p = unsafe { libc::dlsym(self.lib, c.as_ptr()) };
        assert!(!p.is_null(), "{name}");
        // SAFETY: same size (checked), and the caller says it is of that type.
        unsafe { std::mem::transmute_copy(&p) }
    }

    fn call1<A, R>(&self, name: &str, a: A) -> R {
        // SAFETY: used below with control.rs's signatures only.
        unsafe { self.symbol::<extern "C" fn(A) -> R>(name)(a) }
    }

    pub fn set_devices(&self, n: u32) {
        self.call1::<u32, ()>("softgpu_set_device_count", n);
    }

    pub fn set_total(&self, n: u64) {
        self.call1::<u64, ()>("softgpu_set_total_memory", n);
    }

    pub fn set_sm(&self, n: u32) {
        self.call1::<u32, ()>("softgpu_set_compute_capability", n);
    }

    pub fn set_managed(&self, on: bool) {
        self.call1::<i32, ()>("softgpu_set_managed_memory", on.into());
    }

    pub fn set_concurrent(&self, on: bool) {
        self.call1::<i32, ()>("softgpu_set_concurrent_managed_access", on.into());
    }

    pub fn set_budget(&self, n: u64) {
        self.call1::<u64, ()>("softgpu_set_instruction_budget", n);
    }

    pub fn text(&self, name: &str) -> String {
        // SAFETY: all text functions share this signature.
        let f = unsafe { self.symbol::<unsafe extern "C" fn(*mut u8, usize) -> usize>(name) };
        // SAFETY: null is allowed.
        let n = unsafe { f(std::ptr::null_mut(), 0) };
        let mut b = vec![0u8; n + 1];
        // SAFETY: `b` is that long.
        unsafe { f(b.as_mut_ptr(), b.len()) };
        b.pop();
        String::from_utf8(b).unwrap()
    }

    pub fn fail(&self, name: &str, k: u64, code: i32) -> i32 {
        let c = CString::new(name).unwrap();
        // SAFETY: control.rs's signature, and a NUL-terminated name.
        unsafe {
            self.symbol::<unsafe extern "C" fn(*const c_char, u64, i32) -> i32>("softgpu_fail")(
                c.as_ptr(),
                k,
                code,
            )
        }
    }

    /// Returns how many faults had not happened.
    pub fn disarm(&self) -> usize {
        // SAFETY: control.rs's signature.
        unsafe { self.symbol::<extern "C" fn() -> usize>("softgpu_disarm")() }
    }

    pub fn set_version(&self, version: i32) {
        self.call1::<i32, ()>("softgpu_set_driver_version", version);
    }

    pub fn count(&self, name: &str) -> usize {
        let c = CString::new(name).unwrap();
        self.call1("softgpu_call_count", c.as_ptr())
    }

    pub fn syncs(&self) -> usize {
        // SAFETY: control.rs's signature.
        unsafe { self.symbol::<extern "C" fn() -> usize>("softgpu_sync_count")() }
    }

    pub fn clear(&self) {
        // SAFETY: control.rs's signature.
        unsafe { self.symbol::<extern "C" fn()>("softgpu_clear_logs")() }
    }

    pub fn adopt<T>(&self, data: &mut [T], device: i32) -> i32 {
        let (p, n) = (data.as_mut_ptr() as u64, std::mem::size_of_val(data) as u64);
        // SAFETY: control.rs's signature; callers unadopt or reset before the slice ends.
        unsafe {
            self.symbol::<unsafe extern "C" fn(u64, u64, i32) -> i32>("softgpu_adopt")(p, n, device)
        }
    }

    pub fn unadopt(&self, at: u64) -> i32 {
        self.call1("softgpu_unadopt", at)
    }

    /// As if the host had used these bytes of managed memory.
    pub fn host_touch(&self, at: u64, len: u64) -> i32 {
        // SAFETY: control.rs's signature.
        unsafe { self.symbol::<extern "C" fn(u64, u64) -> i32>("softgpu_host_touch")(at, len) }
    }

    pub fn resident(&self, at: u64, device: i32) -> u64 {
        // SAFETY: control.rs's signature.
        unsafe { self.symbol::<extern "C" fn(u64, i32) -> u64>("softgpu_resident")(at, device) }
    }

    /// A number in the leak report.
    pub fn leak(&self, what: &str) -> u64 {
        let t = self.text("softgpu_leaks");
        let at = t.find(&format!("\"{what}\":")).unwrap_or_else(|| panic!("{what} in {t}"));
        t[at + what.len() + 3..]
            .chars()
            .take_while(char::is_ascii_digit)
            .collect::<String>()
            .parse()
            .unwrap()
    }
}
