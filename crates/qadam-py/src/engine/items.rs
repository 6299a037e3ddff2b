//! What a dictionary holds, by identity: whether anything was added, removed or replaced.

use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::PyDict;

/// Addresses of a key and its value.
pub type Item = (usize, usize);

/// Keys and values by identity, in order.
pub fn identities(dict: &Bound<'_, PyDict>) -> Vec<Item> {
    dict.iter().map(|(key, value)| (key.as_ptr().addr(), value.as_ptr().addr())).collect()
}

/// Whether [`identities`] would give `items`. What has been freed since may have given its address to
/// something else: keep what matters.
pub fn holds(dict: &Bound<'_, PyDict>, items: &[Item]) -> bool {
    let mut items = items.iter();
    let (mut at, mut key, mut value) = (0, std::ptr::null_mut(), std::ptr::null_mut());
    // SAFETY: a dictionary, which nothing changes meanwhile, as no Python runs; what is lent of it are
    // addresses, which are compared and not followed.
    while unsafe { ffi::PyDict_Next(dict.as_ptr(), &raw mut at, &raw mut key, &raw mut value) } != 0
    {
        if items.next() != Some(&(key.addr(), value.addr())) {
            return false;
        }
    }
    items.next().is_none()
}
