//! Finds out how tensors are built, by changing some.

use std::ffi::CStr;
use std::hash::{BuildHasher, RandomState};

use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::PyDict;

use super::{Address, Layout, MOST, Part, WORD, word};

/// What can become of a tensor and of a storage, and what happens to tensors that stay what they are. What
/// an experiment returns is kept while its outcome is looked at. They are done on a thread of their own, as
/// torch's modes (inference, fake tensors, functions and hooks of users) belong to a thread.
const EXPERIMENTS: &CStr = c"
def fresh():
    return torch.zeros(5, 6, device='cpu', dtype=torch.float32)[1:]

def become(of):
    def change(t):
        t.data = of(t.data)
    return change

tensor_changes = [
    become(lambda t: t.clone()),
    become(lambda t: t.t()),
    become(lambda t: t[:1]),
    become(lambda t: t[1:]),
    become(lambda t: t.as_strided(t.shape, t.stride(), 0)),
    become(lambda t: t[:, :3]),
    become(lambda t: t[:1].expand_as(t)),
    become(lambda t: t.view(-1)),
    become(lambda t: t.view(2, 2, 6)),
    become(lambda t: t.view(2, 3, 4)),
    become(lambda t: t.view(1, 1, 2, 2, 6)),
    become(lambda t: t[0, 0]),
    become(lambda t: t.view(torch.int32)),
    become(lambda t: t.view(torch.bfloat16)[:, :6]),
    become(lambda t: t.view(torch.uint8)[:, :6]),
    become(lambda t: torch.view_as_complex(t.view(2, 6, 2))),
    become(torch._neg_view),
]

storage_changes = [
    lambda t: t.untyped_storage().resize_(0),
    lambda t: t.untyped_storage().resize_(4000),
    lambda t: t.detach().untyped_storage().resize_(0),
    lambda t: t.detach().resize_(50, 50),
]
if hasattr(torch, '_lazy_clone'):  # memory that is copied when it is written
    storage_changes.append(torch._lazy_clone)

def save_for_backward(t):
    return torch.ones_like(t, requires_grad=True) * t

def look_like(t):
    return t.shape, t.stride(), t.data_ptr(), t.is_neg(), t.storage_offset()

def in_place(t):
    t.add_(1).mul_(t.detach())

tensor_visits = [save_for_backward, look_like, in_place]
storage_visits = [lambda t: t.detach(), lambda t: [t.detach().view(-1), t[0]]]
";

/// How often an experiment must come out alike.
const TIMES: usize = 3;

/// The words of the object at an address, and of what follows it.
type Words = [u64; MOST];

/// An experiment, which takes a tensor.
type Experiment<'py> = Bound<'py, PyAny>;

/// What is done to torch's objects of a kind.
struct Done<'py> {
    changes: Vec<Experiment<'py>>,
    /// The first one is counted by the object.
    visits: Vec<Experiment<'py>>,
}

/// [`EXPERIMENTS`], ready to be done.
struct Experiments<'py> {
    fresh: Bound<'py, PyAny>,
    tensor: Done<'py>,
    storage: Done<'py>,
}

impl<'py> Experiments<'py> {
    fn new(py: Python<'py>) -> PyResult<Self> {
        let all = PyDict::new(py);
        all.set_item("torch", py.import("torch")?)?;
        py.run(EXPERIMENTS, Some(&all), None)?;
        let get = |name: &str| all.as_any().get_item(name);
        let done = |of: &str| -> PyResult<Done<'py>> {
            Ok(Done {
                changes: get(&format!("{of}_changes"))?.extract()?,
                visits: get(&format!("{of}_visits"))?.extract()?,
            })
        };
        Ok(Self { fresh: get("fresh")?, tensor: done("tensor")?, storage: done("storage")? })
    }
}

/// How tensors are built, if every change is seen so, and no visit.
pub fn layout(py: Python<'_>) -> PyResult<Option<Layout>> {
    let experiments = Experiments::new(py)?;
    let Some(found) = find(&experiments)? else { return Ok(None) };
    let Experiments { tensor, storage, .. } = &experiments;
    let changes = tensor.changes.iter().chain(&storage.changes).map(|change| (change, true));
    let visits = tensor.visits.iter().chain(&storage.visits).map(|visit| (visit, false));
    for (experiment, is_change) in changes.chain(visits) {
        let tensor = experiments.fresh.call0()?;
        let before = found.look(&tensor);
        let kept = experiment.call1((&tensor,))?;
        let meanwhile = found.look(&tensor);
        drop(kept);
        let looks = [meanwhile != before, found.look(&tensor) != before];
        if before.is_none() || looks != [is_change; 2] {
            return Ok(None);
        }
    }
    Ok(Some(found))
}

/// Where each object has the address of the next, its count, and the words by which changes are seen.
fn find(experiments: &Experiments<'_>) -> PyResult<Option<Layout>> {
    let sample = experiments.fresh.call0()?;
    let [of_tensor, of_storage] = addresses(&sample)?;
    let size: usize = sample.get_type().getattr("__basicsize__")?.extract()?;
    // SAFETY: an object has as many bytes as its type says.
    let of_object = |place| unsafe { word(sample.as_ptr().addr(), place) };
    let tensor_at = only((0..size / WORD).filter(|&place| of_object(place) == of_tensor as u64));
    let Some(words) = peek(of_tensor) else { return Ok(None) };
    let storage_at = (0..MOST).find(|&place| words[place] == of_storage as u64);

    let tensor = part(experiments, &experiments.tensor, 0)?;
    let storage = part(experiments, &experiments.storage, 1)?;
    let (Some(tensor_at), Some(storage_at), Some(tensor), Some(storage)) =
        (tensor_at, storage_at, tensor, storage)
    else {
        return Ok(None);
    };
    if storage_at >= tensor.end {
        return Ok(None);
    }
    // the first word of Python's objects is their count
    let object = Part { end: tensor_at + 1, counter: 0 };
    let random = RandomState::new();
    let key = |part: usize, place: usize| random.hash_one((part, place));
    let keys = std::array::from_fn(|part| std::array::from_fn(|place| key(part, place)));
    Ok(Some(Layout { object, tensor, storage, tensor_at, storage_at, keys }))
}

/// The shortest part of an object, the `which`th of [`addresses`], by which each change is seen.
///
/// What lies behind the object may change, too. So of the words that an experiment changes, the first is
/// one of the object's own, and no more is relied on. It is the same one each time, or none is.
fn part(experiments: &Experiments<'_>, done: &Done<'_>, which: usize) -> PyResult<Option<Part>> {
    let changed = |experiment: &Experiment<'_>, but: Option<usize>| -> PyResult<Option<usize>> {
        let mut first = None;
        for time in 0..TIMES {
            let tensor = experiments.fresh.call0()?;
            let address = addresses(&tensor)?[which];
            let before = peek(address);
            let _kept = experiment.call1((&tensor,))?;
            let (Some(before), Some(after)) = (before, peek(address)) else { return Ok(None) };
            let differs = |&place: &usize| before[place] != after[place] && Some(place) != but;
            let found = (0..MOST).find(differs);
            if time > 0 && found != first {
                return Ok(None);
            }
            first = found;
        }
        Ok(first)
    };
    let Some(count) = done.visits.first() else { return Ok(None) };
    let Some(counter) = changed(count, None)? else { return Ok(None) };
    let mut end = counter + 1;
    for change in &done.changes {
        let Some(first) = changed(change, Some(counter))? else { return Ok(None) };
        end = end.max(first + 1);
    }
    Ok(Some(Part { end, counter }))
}

/// The addresses of torch's object and of the storage of a tensor.
fn addresses(tensor: &Bound<'_, PyAny>) -> PyResult<[Address; 2]> {
    let py = tensor.py();
    let address = |object: &Bound<'_, PyAny>| object.getattr(intern!(py, "_cdata"))?.extract();
    Ok([address(tensor)?, address(&tensor.call_method0(intern!(py, "untyped_storage"))?)?])
}

/// The only item.
fn only<T>(mut items: impl Iterator<Item = T>) -> Option<T> {
    let item = items.next()?;
    items.next().is_none().then_some(item)
}

/// The words at an address, through the system: some may be another object's, or nobody's.
#[cfg(target_os = "linux")]
fn peek(address: Address) -> Option<Words> {
    let mut words = [0; MOST];
    let here = libc::iovec { iov_base: words.as_mut_ptr().cast(), iov_len: size_of::<Words>() };
    let there = libc::iovec {
        iov_base: std::ptr::with_exposed_provenance_mut(address),
        iov_len: size_of::<Words>(),
    };
    // SAFETY: the system writes to `words`, which has the room, and reads from this process what can be
    // read at the address; where nothing can, it says so.
    let read = unsafe {
        libc::process_vm_readv(libc::getpid(), &raw const here, 1, &raw const there, 1, 0)
    };
    (usize::try_from(read) == Ok(size_of::<Words>())).then_some(words)
}

#[cfg(not(target_os = "linux"))]
const fn peek(_address: Address) -> Option<Words> {
    None
}
