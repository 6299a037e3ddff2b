//! Threads that are woken start on a core of their own, not on the one that wakes them.
//!
//! Linux wakes a thread on the core of the one that wakes it where it takes all others for busy. In a virtual
//! machine it takes those for busy that have nothing to do, as the host has them do something else then
//! (`available_idle_cpu` in its scheduler). The balance of load parts the two threads after some
//! milliseconds, in which a step of small tensors is over: on two cores it was made by one.

#[cfg(target_os = "linux")]
pub(super) use linux::{Thread, elsewhere};
#[cfg(not(target_os = "linux"))]
pub(super) use others::{Thread, elsewhere};

#[cfg(target_os = "linux")]
mod linux {
    use std::mem::{size_of, zeroed};

    use libc::cpu_set_t;

    const SIZE: usize = size_of::<cpu_set_t>();

    /// A thread, as the system calls it.
    #[derive(Debug, Clone, Copy)]
    pub(in crate::cpu) struct Thread(libc::pid_t);

    impl Thread {
        pub(in crate::cpu) fn current() -> Self {
            // SAFETY: it takes nothing.
            Self(unsafe { libc::gettid() })
        }

        /// The cores that the thread may run on.
        fn cores(self) -> Option<cpu_set_t> {
            // SAFETY: a set of cores is bits, of which none need be set.
            let mut cores = unsafe { zeroed() };
            // SAFETY: the set is as large as is said.
            let result = unsafe { libc::sched_getaffinity(self.0, SIZE, &raw mut cores) };
            (result == 0).then_some(cores)
        }

        /// Sets them; there must be one at least, or nothing happens.
        fn set_cores(self, cores: &cpu_set_t) {
            // SAFETY: the set is as large as is said.
            unsafe { libc::sched_setaffinity(self.0, SIZE, cores) };
        }
    }

    /// Does `wake`, which wakes some of these sleeping threads, while none of them may start on the calling
    /// thread's core, if it may on any other. What the system does not do is not an error.
    pub(in crate::cpu) fn elsewhere<T>(threads: &[Thread], wake: impl FnOnce() -> T) -> T {
        // SAFETY: it takes nothing.
        let Ok(here) = usize::try_from(unsafe { libc::sched_getcpu() }) else { return wake() };
        let cores: Vec<_> = threads.iter().map(|thread| thread.cores()).collect();
        for (thread, cores) in threads.iter().zip(&cores) {
            let Some(mut others) = *cores else { continue };
            // SAFETY: a core beyond the set is none of it.
            unsafe { libc::CPU_CLR(here, &mut others) };
            thread.set_cores(&others);
        }
        let woken = wake();
        for (thread, cores) in threads.iter().zip(&cores) {
            if let Some(cores) = cores {
                thread.set_cores(cores);
            }
        }
        woken
    }

    #[cfg(test)]
    mod tests {
        use std::sync::mpsc::channel;
        use std::thread;

        use super::*;

        fn listed(thread: Thread) -> Vec<usize> {
            let cores = thread.cores().unwrap();
            // SAFETY: a set of cores, which are so many.
            (0..8 * SIZE).filter(|&core| unsafe { libc::CPU_ISSET(core, &cores) }).collect()
        }

        #[test]
        fn threads_keep_off_the_callers_core_while_they_are_woken() {
            let ((say, said), (tell, told)) = (channel(), channel::<()>());
            let sleeper = thread::spawn(move || {
                say.send(Thread::current()).unwrap();
                told.recv()
            });
            let thread = said.recv().unwrap();
            // this thread stays where it is
            let me = Thread::current();
            let allowed = listed(me);
            // SAFETY: an empty set of cores, to which one is added that this thread may run on.
            let here = unsafe {
                let mut here = zeroed();
                libc::CPU_SET(allowed[0], &mut here);
                here
            };
            me.set_cores(&here);
            let others = elsewhere(&[thread], || listed(thread));
            if allowed.len() == 1 {
                assert_eq!(others, allowed);
            } else {
                assert_eq!(others, allowed[1..]);
            }
            assert_eq!(listed(thread), allowed);
            drop(tell);
            assert!(sleeper.join().unwrap().is_err());
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
}
