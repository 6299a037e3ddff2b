//! Where the memory is that checking an optimizer's tensors reads, so that another thread can ask for it.
//!
//! Between two steps a model's passes put that memory out of the caches: some thirty lines a parameter, in as
//! many places. A core waits for only so many at a time, and the check, which holds the GIL, is one
//! thread's. Another thread that runs along the same places ahead of it waits for as many again; what that
//! has asked for is then in a cache that both share. Nothing is read there, so a trail that is out of
//! date does no harm, and nobody waits for its end.
//!
//! Where a virtual machine says that its cores share a cache and they do not, what the other one has asked for may
//! be further away than memory: a [`Trial`] finds that out.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use qadam_core::cpu::{Trial, pool};

use super::slot::Slot;
use crate::place::Place;
use crate::tensor::Device;

/// Parameters that are asked for at once: a few MiB, which are still in a cache when they are looked at.
const STRETCH: usize = 2048;

/// With fewer, all is over when the other thread is awake.
const FEWEST: usize = 256;

/// After how many steps a trail is renewed, which takes as long as a tenth of a check.
const EVERY: u32 = 32;

/// After how many steps it is renewed when parameters have been registered: by then there are impressions, which
/// say where tensors are, of gradients, too.
const SOON: u32 = 3;

/// The places of each [`STRETCH`] parameters on a CPU, in the order in which they are looked at.
pub struct Trail {
    stretches: Vec<Arc<[Place]>>,
    /// Steps until it is renewed.
    due: u32,
    /// Whether the check is, so that a thread that came late goes on to the step.
    is_over: Arc<AtomicBool>,
    trial: Trial,
    begun: Instant,
}

impl Trail {
    /// None yet.
    pub fn new() -> Self {
        Self {
            stretches: Vec::new(),
            due: SOON,
            is_over: Arc::default(),
            trial: Trial::new(),
            begun: Instant::now(),
        }
    }

    /// Renews it soon, as parameters have been registered.
    pub fn expect_change(&mut self) {
        self.due = self.due.min(SOON);
    }

    /// Begins a check.
    pub fn begin(&mut self) {
        self.begun = Instant::now();
    }

    /// Announces, in a step on so many threads, that the parameters from `index` on will be looked at, one
    /// after the other.
    pub fn announce(&self, index: usize, threads: usize) {
        if index.is_multiple_of(STRETCH)
            && self.trial.is_on()
            && let Some(stretch) = self.stretches.get(index / STRETCH)
            && !stretch.is_empty()
        {
            let (stretch, is_over) = (Arc::clone(stretch), Arc::clone(&self.is_over));
            pool::aside(threads, move || {
                let is_on = |_: &&Place| !is_over.load(Ordering::Relaxed);
                stretch.iter().take_while(is_on).for_each(|place| place.prefetch());
            });
        }
    }

    /// Ends the check of a step on so many threads; its `slots` are current.
    pub fn end(&mut self, slots: &[Option<Slot>], threads: usize) {
        std::mem::take(&mut self.is_over).store(true, Ordering::Relaxed);
        self.trial.note(self.begun.elapsed());
        self.due = self.due.saturating_sub(1);
        if self.due > 0 || !(Place::MATTERS && pool::has_neighbour(threads)) {
            return;
        }
        let places = |slots: &[Option<Slot>]| -> Arc<[Place]> {
            let on_cpu = slots.iter().flatten().filter(|slot| slot.param.device == Device::Cpu);
            let is_enough = on_cpu.clone().count() >= FEWEST;
            on_cpu.filter(|_| is_enough).flat_map(Slot::places).collect()
        };
        self.stretches = slots.chunks(STRETCH).map(places).collect();
        (self.due, self.trial) = (EVERY, Trial::new());
    }
}
