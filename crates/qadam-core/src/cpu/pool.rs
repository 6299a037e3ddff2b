//! Threads: how many, and a pool for that many that survives `fork`.
//!
//! Threads do not live on in a forked child (a `DataLoader` worker, `multiprocessing`'s default on
//! Linux), so a pool inherited from the parent would wait forever. Pools therefore belong to a
//! process id: a child finds its parent's and starts its own. The parent's is leaked there, not
//! dropped, as dropping it would wait for the threads that are not there; its lock is never taken,
//! as another thread may have held it when the process forked.

use std::process;
use std::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use rayon::{ThreadPool, ThreadPoolBuilder};

use super::cores::{Thread, elsewhere, share_a_cache};
use crate::error::{Error, Result};

/// Threads.
struct Pool {
    rayon: ThreadPool,
    /// Those that have started, which may be a moment after the pool was made.
    threads: Arc<Mutex<Vec<Thread>>>,
}

/// The pool of one process: that of the size used last, so that threads do not pile up.
struct Current {
    process: u32,
    pool: Mutex<Option<Arc<Pool>>>,
}

static CURRENT: AtomicPtr<Current> = AtomicPtr::new(std::ptr::null_mut());

/// This process's pool.
fn current() -> &'static Current {
    let process = process::id();
    let found = CURRENT.load(Ordering::Acquire);
    // SAFETY: the pointer is null or came from `Box::into_raw` below and is never freed.
    if let Some(current) = unsafe { found.as_ref() }
        && current.process == process
    {
        return current;
    }
    let fresh = Box::into_raw(Box::new(Current { process, pool: Mutex::default() }));
    match CURRENT.compare_exchange(found, fresh, Ordering::AcqRel, Ordering::Acquire) {
        // SAFETY: `fresh` is now shared for the life of the process.
        Ok(_) => unsafe { &*fresh },
        Err(winner) => {
            // SAFETY: `fresh` was never shared; `winner`, stored by another thread of this
            // process, is never freed.
            unsafe {
                drop(Box::from_raw(fresh));
                &*winner
            }
        }
    }
}

/// A pool of `count` threads, started where this process's last one had another number.
///
/// # Errors
/// [`Error::ThreadPool`] where the system does not give the threads.
fn pool(count: usize) -> Result<Arc<Pool>> {
    let mut current = lock(&current().pool);
    if let Some(pool) = current.as_ref().filter(|pool| pool.rayon.current_num_threads() == count) {
        return Ok(Arc::clone(pool));
    }
    let threads = Arc::new(Mutex::new(Vec::new()));
    let started = Arc::clone(&threads);
    let rayon = ThreadPoolBuilder::new()
        .num_threads(count)
        .thread_name(|i| format!("qadam-{i}"))
        .start_handler(move |_| lock(&started).push(Thread::current()))
        .build()
        .map_err(|error| Error::ThreadPool { count, reason: error.to_string() })?;
    let pool = Arc::new(Pool { rayon, threads });
    *current = Some(Arc::clone(&pool));
    Ok(pool)
}

/// What `mutex` holds, whoever panicked with it: nothing is left half done under these locks.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Starts the pool of `count` threads, so that no later step can fail for want of it.
///
/// # Errors
/// [`Error::ThreadPool`] where the system does not give the threads.
pub fn start(count: usize) -> Result<()> {
    if count > 1 { pool(count).map(|_| ()) } else { Ok(()) }
}

/// The number of threads to use: `QADAM_NUM_THREADS` if set, else `fallback` (Python passes
/// `torch.get_num_threads()`). The variable is read at the first call.
///
/// # Errors
/// [`Error::Threads`] where the variable is not a whole number from 1 to 1024.
pub fn threads(fallback: usize) -> Result<usize> {
    static CHOSEN: OnceLock<Result<Option<usize>>> = OnceLock::new();
    let chosen =
        CHOSEN.get_or_init(|| parse(super::variable("QADAM_NUM_THREADS").as_deref())).clone()?;
    Ok(chosen.unwrap_or(fallback).max(1))
}

fn parse(value: Option<&str>) -> Result<Option<usize>> {
    let Some(value) = value.filter(|value| !value.is_empty()) else {
        return Ok(None);
    };
    match value.parse() {
        Ok(count @ 1..=1024) => Ok(Some(count)),
        _ => Err(Error::Threads { value: value.to_owned() }),
    }
}

/// Does `work` for each of `parts`, taken in turn by the calling thread and by as many others as make
/// `threads`.
///
/// The caller works, too, as a step may be over in milliseconds, of which waking takes its share.
///
/// # Errors
/// [`Error::ThreadPool`], before any work is done.
pub(super) fn share<T: Send>(
    parts: impl ExactSizeIterator<Item = T> + Send,
    threads: usize,
    work: impl Fn(T) + Sync,
) -> Result<()> {
    let pool = pool(threads)?;
    let others = 1..threads.min(parts.len());
    let parts = Mutex::new(parts);
    let take_turns = || {
        let turns = || lock(&parts).next();
        std::iter::from_fn(turns).for_each(&work);
    };
    pool.rayon.in_place_scope(|scope| {
        let wake = || others.for_each(|_| scope.spawn(|_| take_turns()));
        elsewhere(&lock(&pool.threads), wake);
        take_turns();
    });
    Ok(())
}

/// Whether there are several of `threads` threads, and this process's cores share a cache: what one thread has
/// brought there is then near for the others.
#[must_use]
pub fn has_neighbour(threads: usize) -> bool {
    threads > 1 && share_a_cache()
}

/// Has `work` done by one of `threads` threads, while the caller goes on, if it [has a
/// neighbour](has_neighbour).
///
/// Nobody is told when it is done, or that it was not, as the system gave no thread: it is for what changes
/// nothing but speed.
pub fn aside(threads: usize, work: impl FnOnce() + Send + 'static) {
    if has_neighbour(threads)
        && let Ok(pool) = pool(threads)
    {
        elsewhere(&lock(&pool.threads), || pool.rayon.spawn(work));
    }
}

/// [`share`]; adds up what `work` returns.
///
/// # Errors
/// As [`share`].
pub(super) fn sum<T: Send>(
    parts: impl ExactSizeIterator<Item = T> + Send,
    threads: usize,
    work: impl Fn(T) -> usize + Sync,
) -> Result<usize> {
    let total = AtomicUsize::new(0);
    share(parts, threads, |part| {
        total.fetch_add(work(part), Ordering::Relaxed);
    })?;
    Ok(total.into_inner())
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;
    use std::sync::mpsc::channel;
    use std::thread;

    use super::*;

    #[test]
    fn the_variable_is_a_count_or_an_error() {
        assert_eq!(parse(None), Ok(None));
        assert_eq!(parse(Some("")), Ok(None));
        assert_eq!(parse(Some("3")), Ok(Some(3)));
        for bad in ["0", "-1", "two", "1025"] {
            assert!(parse(Some(bad)).is_err(), "{bad}");
        }
    }

    #[test]
    fn every_part_counts_once_and_the_caller_works_too() {
        for threads in 1..=4 {
            let parts: Vec<usize> = (0..100).collect();
            assert_eq!(sum(parts.iter(), threads, |&part| part), Ok(4950), "{threads} threads");
        }
        assert_eq!(sum([].iter(), 2, |&part: &usize| part), Ok(0));
        // each of two threads has to take one of these, as none goes on without the other
        let (both, workers) = (Barrier::new(2), Mutex::new(Vec::new()));
        let meet = |()| {
            workers.lock().unwrap().push(thread::current().id());
            usize::from(both.wait().is_leader())
        };
        assert_eq!(sum([(), ()].into_iter(), 2, meet), Ok(1));
        assert!(workers.into_inner().unwrap().contains(&thread::current().id()));
    }

    #[test]
    fn work_aside_is_done_by_another_thread_if_one_shares_a_cache() {
        let (say, said) = channel();
        let tell = say.clone();
        aside(1, move || tell.send(thread::current().id()).unwrap());
        aside(2, move || say.send(thread::current().id()).unwrap());
        let by: Vec<_> = said.iter().collect();
        assert_eq!(by.len(), usize::from(has_neighbour(2)));
        assert!(!by.contains(&thread::current().id()));
    }

    #[test]
    fn a_pool_is_started_once() {
        assert!(Arc::ptr_eq(&pool(2).unwrap(), &pool(2).unwrap()));
    }
}
