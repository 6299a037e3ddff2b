//! Paged state of CUDA parameters: managed memory, in one arena a device and optimizer.
//!
//! The driver moves pages between the host and the device; [`Stepper`](crate::cuda::Stepper) asks
//! it to, ahead of the kernels. One arena, because migrations are the cheaper the larger they are.

use std::ops::Range;
use std::sync::Arc;

use super::registry::Registry;
use super::{Extents, HUGE};
use crate::cuda::{Context, ManagedMemory};
use crate::error::{Error, Result};

static ARENAS: Registry<Arena> = Registry::new();

/// Managed memory for the state of many parameters.
///
/// It is freed with its last [`Arc`], after waiting for the device. Do not drop that during the
/// capture of a CUDA graph: waiting would end it.
#[derive(Debug)]
pub struct Arena {
    extents: Extents,
    ordinal: usize,
    address: u64,
    /// None where there is nothing to hold.
    memory: Option<ManagedMemory>,
}

/// Whether a device can hold paged state.
///
/// # Errors
/// [`Error::NoManagedMemory`] if it cannot, [`Error::CudaUnavailable`], [`Error::Cuda`].
pub fn check(ordinal: usize) -> Result<()> {
    context(ordinal).map(drop)
}

/// The arena that `address` lies in.
#[must_use]
pub fn find(address: u64) -> Option<Arc<Arena>> {
    ARENAS.find(address as usize)
}

/// Whether there is no arena, as is usual: then no address needs looking up.
pub(crate) fn is_unused() -> bool {
    ARENAS.is_empty()
}

/// The context of a device that has managed memory.
fn context(ordinal: usize) -> Result<&'static Context> {
    let context = Context::get(ordinal)?;
    if context.has_managed_memory()? {
        Ok(context)
    } else {
        Err(Error::NoManagedMemory { ordinal })
    }
}

/// Memory of which `bytes` begin at a multiple of [`HUGE`].
fn allocate(context: &'static Context, bytes: usize) -> Result<ManagedMemory> {
    let memory = ManagedMemory::new(context, bytes)?;
    if memory.address.is_multiple_of(HUGE as u64) {
        return Ok(memory);
    }
    // Drivers align large allocations by themselves. What is more than needed stays untouched, and
    // pages that nobody touches take no memory.
    drop(memory);
    ManagedMemory::new(context, bytes + HUGE)
}

impl Arena {
    /// Memory for the state of parameters of these formats and lengths in elements, on the device
    /// of this number. The contents are arbitrary.
    ///
    /// # Errors
    /// [`Error::NoManagedMemory`] where the device has none, [`Error::CudaUnavailable`],
    /// [`Error::Cuda`].
    pub fn new(ordinal: usize, params: &[(crate::StateFormat, usize)]) -> Result<Arc<Self>> {
        let context = context(ordinal)?;
        let extents = Extents::new(params);
        if extents.bytes() == 0 {
            return Ok(Arc::new(Self { extents, ordinal, address: 0, memory: None }));
        }
        let _current = context.enter()?;
        let memory = allocate(context, extents.bytes())?;
        // "Accessed by" the device keeps pages mapped for it wherever they are: a kernel reads one
        // that no prefetch has brought over the bus, as captured steps do, and does not fault. No
        // preferred location: on the device it would make the driver move other memory out for
        // state that nobody asked for, on the host it would keep kernels from what they do often.
        if context.has_concurrent_access()? {
            memory.map_for_device()?;
        }
        let address = memory.address.next_multiple_of(HUGE as u64);
        let arena = Arc::new(Self { extents, ordinal, address, memory: Some(memory) });
        ARENAS.insert(&arena.range(), &arena);
        Ok(arena)
    }

    /// Where the state of each parameter lies, from [`Arena::address`] on.
    #[must_use]
    pub fn extents(&self) -> &Extents {
        &self.extents
    }

    /// Address of the first byte, for the host and for every device: a multiple of 2 MiB.
    #[must_use]
    pub const fn address(&self) -> u64 {
        self.address
    }

    /// How many bytes were allocated.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.memory.as_ref().map_or(0, |memory| memory.bytes)
    }

    /// The device's number.
    #[must_use]
    pub const fn ordinal(&self) -> usize {
        self.ordinal
    }

    /// The addresses that hold state.
    pub(crate) fn addresses(&self) -> Range<u64> {
        self.address..self.address + self.extents.bytes() as u64
    }

    fn range(&self) -> Range<usize> {
        let Range { start, end } = self.addresses();
        start as usize..end as usize
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        if self.memory.is_some() {
            // Before the memory is freed, as another arena may get its addresses.
            ARENAS.remove(self.range().start);
        }
    }
}
