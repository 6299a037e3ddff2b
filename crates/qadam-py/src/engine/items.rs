//! What a dictionary holds, by identity: whether anything was added, removed or replaced.

use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::place::Place;

/// Addresses of a key and its value.
pub type Item = (usize, usize);

/// Keys and values by identity, in order.
pub fn identities(dict: &Bound<'_, PyDict>) -> impl Iterator<Item = Item> {
    dict.iter().map(|(key, value)| (key.as_ptr().addr(), value.as_ptr().addr()))
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

/// Where Python keeps a dictionary and a few entries of its table, which [`holds`] reads.
pub fn places(dict: &Bound<'_, PyDict>) -> [Place; 2] {
    /// Where the table's address is in a dictionary.
    const TABLE: usize = 4 * size_of::<usize>();
    const END: usize = TABLE + size_of::<usize>();
    let size = dict.get_type().getattr("__basicsize__").and_then(|size| size.extract::<usize>());
    let table = if size.is_ok_and(|size| size >= END) {
        // SAFETY: a dictionary, which has as many bytes as its type says; whatever it holds there, a
        // number is read.
        unsafe { dict.as_ptr().byte_add(TABLE).cast::<usize>().read() }
    } else {
        0 // there is then nothing to hint at
    };
    let object = dict.as_ptr().addr();
    [Place { start: object, bytes: END }, Place { start: table, bytes: 4 * 64 }]
}
