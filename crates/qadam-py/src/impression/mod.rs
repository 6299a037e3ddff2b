//! Whether a tensor is what it was, without asking torch: by the words of memory that it consists of.
//!
//! A tensor in Python is three objects: Python's, which has the address of torch's, which has the
//! address of a storage. Torch answers a question about them in a tenth of a microsecond, and there are
//! up to seven tensors to ask about for each parameter; most of the time nothing has changed. An
//! [`Impression`] is a sum over words of the three objects. While it stays, so have the tensor's address,
//! device, type, shape, strides and flags. A word too many does no harm: where the sum differs, torch is
//! asked, and a new impression taken.
//!
//! Which words is not known but learned (`learn`), by changing tensors in the ways in which they change, and
//! looking at what becomes of their words: from the start of each object to the last word by which a
//! change is seen first, but for the reference count. What is learned is then tried. With a torch whose
//! objects are built in another way, in which a change would not be seen, there are no impressions. Nor
//! are there where a process cannot read its own memory by a call that fails where there is none, as
//! Linux has it.

mod learn;

use std::thread;

use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;

use crate::exchange::{Exchange, Seen};
use crate::place::Place;

/// The address of an object of Python's or torch's.
type Address = usize;

/// Bytes of a word.
const WORD: usize = size_of::<u64>();

/// More words than each of the objects has.
const MOST: usize = 32;

/// Which words of an object are looked at: the first `end`, but for its reference count.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Part {
    end: usize,
    counter: usize,
}

/// How tensors are built.
struct Layout {
    object: Part,
    tensor: Part,
    storage: Part,
    /// Which word of Python's object has the address of torch's.
    tensor_at: usize,
    /// Which word of torch's object has the address of the storage.
    storage_at: usize,
    /// By what the words of each part are multiplied: random, so that objects that differ have the same
    /// sum with a chance of at most `2^-64`. (Given all other keys, there is at most one for a word that
    /// differs: differences are below `2^64`, and so no product of two is a multiple of `2^128`.)
    keys: [[u64; MOST]; 3],
}

/// Whether impressions are taken of this torch's tensors. Without them steps are slower, no more.
#[pyfunction]
pub fn takes_impressions(py: Python<'_>) -> bool {
    Exchange::get(py).is_some() && Layout::get(py).is_some()
}

/// Learns what there is to learn, so that no step has to.
pub fn prepare(py: Python<'_>) {
    Layout::get(py);
}

/// A tensor's words, added up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Impression {
    /// What kind of object: only of tensors is it known what they are made of.
    kind: Address,
    object: Address,
    tensor: Address,
    storage: Address,
    /// The halves of a number.
    sum: [u64; 2],
}

impl Impression {
    /// That of `object`, which is `seen`; `None` where there is no telling.
    pub fn take(object: &Bound<'_, PyAny>, seen: &Seen<'_>) -> Option<Self> {
        let layout = Layout::get(object.py())?;
        let now = layout.look(object)?;
        // long lists of sizes are not in the tensor itself
        let own = now.tensor..now.tensor + layout.tensor.end * WORD;
        let is_within = |list: &[i64]| {
            let place = list.as_ptr_range();
            list.is_empty() || (own.start <= place.start.addr() && place.end.addr() <= own.end)
        };
        (is_within(seen.shape) && is_within(seen.strides)).then_some(now)
    }

    /// What [`holds`](Self::holds) reads, about. Between two steps a model's passes put its tensors out of
    /// the processor's caches, and each object says only where the next one is.
    pub fn places(&self) -> [Place; 3] {
        [(self.object, 3), (self.tensor, 22), (self.storage, 4)]
            .map(|(start, words)| Place { start, bytes: words * WORD })
    }

    /// Whether `object` is the tensor that it was taken of, and still what it was.
    pub fn holds(&self, object: &Bound<'_, PyAny>) -> bool {
        (self.kind, self.object) == (object.get_type_ptr().addr(), object.as_ptr().addr())
            && Layout::get(object.py()).and_then(|layout| layout.look(object)) == Some(*self)
    }
}

impl Layout {
    /// What is learned at the first call.
    fn get(py: Python<'_>) -> Option<&'static Self> {
        static LAYOUT: PyOnceLock<Option<Layout>> = PyOnceLock::new();
        let learn = || Python::attach(|py| learn::layout(py).ok().flatten());
        let elsewhere = || {
            thread::scope(|scope| {
                thread::Builder::new().spawn_scoped(scope, learn).ok()?.join().ok()?
            })
        };
        LAYOUT.get_or_init(py, || py.detach(elsewhere)).as_ref()
    }

    /// The impression that `object`, a tensor, makes; `None` for one without a storage.
    fn look(&self, object: &Bound<'_, PyAny>) -> Option<Impression> {
        let [of_object, of_tensor, of_storage] = &self.keys;
        let (kind, object) = (object.get_type_ptr().addr(), object.as_ptr().addr());
        // SAFETY: the tensor is alive, as it is bound, and each of the three owns the next. `learn` found
        // which words have their addresses, and that the parts are parts of them; a null pointer is
        // not followed.
        unsafe {
            let tensor = word(object, self.tensor_at) as Address;
            if tensor == 0 {
                return None;
            }
            let storage = word(tensor, self.storage_at) as Address;
            if storage == 0 {
                return None;
            }
            let sum = self
                .object
                .sum(object, of_object)
                .wrapping_add(self.tensor.sum(tensor, of_tensor))
                .wrapping_add(self.storage.sum(storage, of_storage));
            Some(Impression {
                kind,
                object,
                tensor,
                storage,
                sum: [sum as u64, (sum >> 64) as u64],
            })
        }
    }
}

impl Part {
    /// Its words times `keys`, added up.
    ///
    /// # Safety
    /// An object that has the part is at `address`.
    #[inline]
    unsafe fn sum(self, address: Address, keys: &[u64; MOST]) -> u128 {
        let run = |range: std::ops::Range<usize>| {
            let mut sum = 0_u128;
            for place in range {
                // SAFETY: this function's contract.
                let word = unsafe { word(address, place) };
                sum = sum.wrapping_add(u128::from(word) * u128::from(keys[place]));
            }
            sum
        };
        run(0..self.counter).wrapping_add(run(self.counter + 1..self.end))
    }
}

/// A word of an object.
///
/// # Safety
/// The object at `address` has more than `place` words, and nobody writes that one meanwhile.
#[inline]
unsafe fn word(address: Address, place: usize) -> u64 {
    // SAFETY: this function's contract; objects are aligned to a word. What lies between an object's
    // members may never have been written, hence a read that the compiler draws no conclusions from.
    unsafe { std::ptr::with_exposed_provenance::<u64>(address).add(place).read_volatile() }
}
