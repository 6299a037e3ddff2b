//! Cores: threads that are woken start on another one than that which wakes them, and which share a cache.
//!
//! In a virtual machine of two cores, Linux was seen to wake a thread that had slept for 10 ms on the core of
//! the one that wakes it, the other core having nothing to do; most likely as the host has such cores do
//! something else, and the scheduler counts them as busy (`available_idle_cpu`). It parts the two later, but
//! a step of small tensors is over in milliseconds: it was made by one core.

#[cfg(target_os = "linux")]
pub(super) use linux::{Thread, elsewhere, share_a_cache};
#[cfg(not(target_os = "linux"))]
pub(super) use others::{Thread, elsewhere, share_a_cache};

#[cfg(target_os = "linux")]
mod linux {
    use std::fs::read_to_string;
    use std::mem::{size_of, zeroed};
    use std::sync::OnceLock;

    use libc::cpu_set_t;

    const SIZE: usize = size_of::<cpu_set_t>();

    /// With more threads than this one core is a small part, and so many calls of the system are not.
    const FEW: usize = 16;

    /// A thread.
    #[derive(Debug, Clone, Copy)]
    pub(in crate::cpu) struct Thread {
        id: libc::pid_t,
        /// The cores that it might run on when it started.
        cores: Option<cpu_set_t>,
    }

    impl Thread {
        pub(in crate::cpu) fn current() -> Self {
            // SAFETY: it takes nothing. (C libraries have a function for it only of late.)
            let id = unsafe { libc::syscall(libc::SYS_gettid) } as libc::pid_t;
            Self { id, cores: cores(id) }
        }
    }

    /// The cores that a thread may run on.
    fn cores(id: libc::pid_t) -> Option<cpu_set_t> {
        // SAFETY: a set of cores is bits, of which none need be set.
        let mut cores = unsafe { zeroed() };
        // SAFETY: the set is as large as is said.
        let result = unsafe { libc::sched_getaffinity(id, SIZE, &raw mut cores) };
        (result == 0).then_some(cores)
    }

    /// Sets them; there must be one at least, or nothing happens.
    fn set_cores(id: libc::pid_t, cores: &cpu_set_t) {
        // SAFETY: the set is as large as is said.
        unsafe { libc::sched_setaffinity(id, SIZE, cores) };
    }

    /// Does `wake`, which wakes some of these sleeping threads, while none of them may start on the calling
    /// thread's core, if it may on any other. What the system does not do is not an error.
    ///
    /// Threads that somebody else has given other cores, or whose container has others now, are left alone: to
    /// put back fewer than there were would make that last.
    pub(in crate::cpu) fn elsewhere<T>(threads: &[Thread], wake: impl FnOnce() -> T) -> T {
        // SAFETY: it takes nothing.
        let here = usize::try_from(unsafe { libc::sched_getcpu() }).unwrap_or(usize::MAX);
        if here >= 8 * SIZE || threads.len() > FEW {
            return wake();
        }
        let threads: Vec<_> = threads
            .iter()
            .filter_map(|thread| Some((thread.id, thread.cores?, cores(thread.id)?)))
            // SAFETY: two sets of cores.
            .filter(|(_, before, now)| unsafe { libc::CPU_EQUAL(before, now) })
            .map(|(id, cores, _)| (id, cores))
            .collect();
        for &(id, mut others) in &threads {
            // SAFETY: the core is within the set.
            unsafe { libc::CPU_CLR(here, &mut others) };
            set_cores(id, &others);
        }
        let woken = wake();
        for (id, cores) in &threads {
            set_cores(*id, cores);
        }
        woken
    }

    /// Whether this process has more cores than one (those that the first caller may run on) and they share
    /// their last cache, by what the system says. (A virtual machine may have cores that are further apart.)
    pub(in crate::cpu) fn share_a_cache() -> bool {
        static ANSWER: OnceLock<bool> = OnceLock::new();
        *ANSWER.get_or_init(|| {
            let Some(mine) = cores(0) else { return false };
            // SAFETY: a set of cores, which are so many.
            let mine = (0..8 * SIZE).filter(|&core| unsafe { libc::CPU_ISSET(core, &mine) });
            let [one, others @ ..] = &mine.collect::<Vec<_>>()[..] else { return false };
            let sharing = (0..8).rev().find_map(|index| {
                let cache = format!("/sys/devices/system/cpu/cpu{one}/cache/index{index}");
                read_to_string(cache + "/shared_cpu_list").ok()
            });
            let is_sharing = |&core: &usize| sharing.as_ref().is_some_and(|list| has(list, core));
            !others.is_empty() && others.iter().all(is_sharing)
        })
    }

    /// Whether a list like `0-3,8` has a core.
    fn has(list: &str, core: usize) -> bool {
        let number = |text: &str| text.trim().parse::<usize>().ok();
        list.split(',').any(|part| {
            let (from, to) = part.split_once('-').unwrap_or((part, part));
            number(from).zip(number(to)).is_some_and(|(from, to)| (from..=to).contains(&core))
        })
    }

    #[cfg(test)]
    mod tests {
        use std::sync::mpsc::channel;
        use std::thread;

        use super::*;

        fn listed(thread: Thread) -> Vec<usize> {
            let cores = cores(thread.id).unwrap();
            // SAFETY: a set of cores, which are so many.
            (0..8 * SIZE).filter(|&core| unsafe { libc::CPU_ISSET(core, &cores) }).collect()
        }

        /// A set of one core.
        fn only(core: usize) -> cpu_set_t {
            // SAFETY: an empty set of cores, to which one of them is added.
            unsafe {
                let mut cores = zeroed();
                libc::CPU_SET(core, &mut cores);
                cores
            }
        }

        #[test]
        fn threads_keep_off_the_callers_core_while_they_are_woken() {
            let ((say, said), (tell, told)) = (channel(), channel::<()>());
            let sleeper = thread::spawn(move || {
                say.send(Thread::current()).unwrap();
                told.recv()
            });
            let thread = said.recv().unwrap();
            let check = move || {
                let me = Thread::current();
                let allowed = listed(me);
                set_cores(me.id, &only(allowed[0])); // where this thread stays
                let others = elsewhere(&[thread], || listed(thread));
                let want = if allowed.len() == 1 { &allowed } else { &allowed[1..] };
                assert_eq!(others, want);
                assert_eq!(listed(thread), allowed);
                // what somebody else has set stays
                set_cores(thread.id, &only(allowed[0]));
                assert_eq!(elsewhere(&[thread], || listed(thread)), allowed[..1]);
                assert_eq!(listed(thread), allowed[..1]);
            };
            thread::spawn(check).join().unwrap(); // which then takes its core with it
            drop(tell);
            assert!(sleeper.join().unwrap().is_err());
        }

        #[test]
        fn a_list_of_cores_is_ranges_and_single_ones() {
            let read = |list: &str| (0..12).filter(|&core| has(list, core)).collect::<Vec<_>>();
            assert_eq!(read("0-2,5,10-11\n"), [0, 1, 2, 5, 10, 11]);
            assert_eq!(read("7"), [7]);
            assert!(read("\n").is_empty());
        }

        #[test]
        fn threads_that_are_gone_are_no_error() {
            let gone = thread::spawn(Thread::current).join().unwrap();
            assert_eq!(elsewhere(&[gone], || 7), 7);
        }
    }
}

#[cfg(not(target_os = "linux"))]
mod others {
    #[derive(Debug, Clone, Copy)]
    pub(in crate::cpu) struct Thread;

    impl Thread {
        pub(in crate::cpu) const fn current() -> Self {
            Self
        }
    }

    pub(in crate::cpu) fn elsewhere<T>(_: &[Thread], wake: impl FnOnce() -> T) -> T {
        wake()
    }

    /// Not known.
    pub(in crate::cpu) const fn share_a_cache() -> bool {
        false
    }
}
