//! The stand-in for `libcuda.so.1`: the C ABI of the driver over one global state.

// The names and signatures are the driver's.
#![allow(non_snake_case, clippy::too_many_arguments)]

pub mod abi;
pub mod clock;
pub mod codes;
pub mod control;
pub mod ops;
pub mod state;

use std::ffi::{CStr, c_char};
use std::sync::{Mutex, MutexGuard, OnceLock};

use codes::{INVALID_VALUE, UNKNOWN};
use state::{Call, Driver, Res};

/// A pointer the caller gave to write a result to: null, or valid for it by every function's contract.
#[repr(transparent)]
pub struct Out<T>(*mut T);

impl<T> Out<T> {
    /// Writes, if the pointer is not null.
    pub fn set(&self, v: T) -> Res {
        if self.0.is_null() {
            return Err(INVALID_VALUE);
        }
        // SAFETY: not null (checked), hence writable for a `T` by the caller's contract.
        unsafe { self.0.write_unaligned(v) };
        Ok(())
    }

    /// Refuses a null pointer before anything is made that it should receive.
    pub fn wanted(&self) -> Res {
        if self.0.is_null() { Err(INVALID_VALUE) } else { Ok(()) }
    }

    /// Writes, unless the pointer is null.
    pub fn maybe(&self, v: T) {
        let _ = self.set(v);
    }

    /// Element `i` of the array it points to.
    pub fn set_at(&self, i: usize, v: T) -> Res {
        if self.0.is_null() {
            return Err(INVALID_VALUE);
        }
        // SAFETY: not null (checked), and the caller's array has more than `i` elements by the function's contract.
        unsafe { self.0.add(i).write_unaligned(v) };
        Ok(())
    }

    /// The address.
    pub fn addr(&self) -> usize {
        self.0 as usize
    }
}

/// An array the caller gave to read: null, or valid by every function's contract.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct In<T>(*const T);

impl<T: Copy> In<T> {
    /// Element `i`.
    pub fn get(&self, i: usize) -> Res<T> {
        if self.0.is_null() {
            return Err(INVALID_VALUE);
        }
        // SAFETY: not null (checked), and the caller's array has more than `i` elements by the function's contract.
        Ok(unsafe { self.0.add(i).read_unaligned() })
    }

    /// Whether there is one.
    pub fn is_null(&self) -> bool {
        self.0.is_null()
    }

    /// The address.
    pub fn addr(&self) -> usize {
        self.0 as usize
    }
}

/// A NUL-terminated string the caller gave.
#[repr(transparent)]
pub struct Text(*const c_char);

impl Text {
    /// As Rust sees it.
    pub fn get(&self) -> Res<String> {
        if self.0.is_null() {
            return Err(INVALID_VALUE);
        }
        // SAFETY: not null (checked), and NUL-terminated by the caller's contract.
        Ok(unsafe { CStr::from_ptr(self.0) }.to_string_lossy().into_owned())
    }
}

fn global() -> MutexGuard<'static, Driver> {
    static STATE: OnceLock<Mutex<Driver>> = OnceLock::new();
    // A panic in a call leaves a driver that still answers; the panic itself was reported.
    STATE
        .get_or_init(|| Mutex::new(Driver::new()))
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// A driver function's name without its version suffix.
pub fn plain(name: &str) -> &str {
    let n = name.strip_suffix("_ptsz").unwrap_or(name);
    n.strip_suffix("_v2").or_else(|| n.strip_suffix("_v3")).unwrap_or(n)
}

/// Every exported driver function runs in here: logged, counted, failed on demand, never unwinding into C.
pub(crate) fn enter(
    name: &'static str,
    stream: Option<u64>,
    bytes: u64,
    f: impl FnOnce(&mut Driver) -> Res,
) -> i32 {
    let run = std::panic::AssertUnwindSafe(|| {
        let mut d = global();
        let call = d.calls.len();
        d.calls.push(Call { name, stream, bytes, result: 0, sync: false, note: String::new() });
        let mut armed = None;
        for a in d.armed.iter_mut().filter(|a| plain(&a.0) == plain(name)) {
            a.1 -= 1;
            if a.1 == 0 {
                armed = Some(a.2);
            }
        }
        d.armed.retain(|a| a.1 > 0);
        let code = match armed {
            Some(code) => {
                d.note("injected".into());
                code
            }
            None => f(&mut d).err().unwrap_or(0),
        };
        if let Some(c) = d.calls.get_mut(call) {
            c.result = code;
        }
        code
    });
    std::panic::catch_unwind(run).unwrap_or_else(|_| {
        eprintln!("softgpu: {name} panicked; this is a bug of softgpu");
        UNKNOWN
    })
}

/// Defines exported functions. `stream` and `bytes` go to the call log.
macro_rules! cuda {
    ($($(#[$doc:meta])* fn $name:ident($($a:ident: $t:ty),* $(,)?) [$stream:expr, $bytes:expr] |$d:ident| $body:block)*) => {
        $(
            $(#[$doc])*
            ///
            /// # Safety
            /// As the CUDA driver API manual says: pointers are null or valid for what the call does.
            #[unsafe(no_mangle)]
            pub unsafe extern "C" fn $name($($a: $t),*) -> i32 {
                $crate::driver::enter(stringify!($name), $stream, $bytes as u64, |$d| $body)
            }
        )*
    };
}
pub(crate) use cuda;
