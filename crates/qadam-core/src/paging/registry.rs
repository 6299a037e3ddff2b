//! The arenas that are alive, found by address.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, LazyLock, Weak};

use arc_swap::ArcSwap;

type Arenas<T> = BTreeMap<usize, (usize, Weak<T>)>;

/// Arenas by the ranges of addresses they take. Nothing here locks, as a lock that another thread
/// holds while the process forks stays locked in the child.
pub(super) struct Registry<T: 'static>(LazyLock<ArcSwap<Arenas<T>>>);

impl<T> Registry<T> {
    pub const fn new() -> Self {
        Self(LazyLock::new(ArcSwap::default))
    }

    /// Makes `arena` known for the addresses of `range`, which no other has.
    pub fn insert(&self, range: &Range<usize>, arena: &Arc<T>) {
        self.0.rcu(|arenas| {
            let mut arenas = Arenas::clone(arenas);
            arenas.insert(range.start, (range.end, Arc::downgrade(arena)));
            arenas
        });
    }

    /// Forgets the arena that begins at `start`; called before its addresses become free.
    pub fn remove(&self, start: usize) {
        self.0.rcu(|arenas| {
            let mut arenas = Arenas::clone(arenas);
            arenas.remove(&start);
            arenas
        });
    }

    /// The arena that `address` lies in.
    pub fn find(&self, address: usize) -> Option<Arc<T>> {
        let arenas = self.0.load();
        let (_, (end, arena)) = arenas.range(..=address).next_back()?;
        if address < *end { arena.upgrade() } else { None }
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.load().is_empty()
    }

    /// All that are alive.
    pub fn all(&self) -> Vec<Arc<T>> {
        self.0.load().values().filter_map(|(_, arena)| arena.upgrade()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_find_their_arena_while_it_lives() {
        static REGISTRY: Registry<&str> = Registry::new();
        let (a, b) = (Arc::new("a"), Arc::new("b"));
        REGISTRY.insert(&(100..200), &a);
        REGISTRY.insert(&(200..250), &b);
        let at = |address| REGISTRY.find(address).map(|arena| *arena);
        assert_eq!(
            [99, 100, 199, 200, 249, 250].map(at),
            [None, Some("a"), Some("a"), Some("b"), Some("b"), None]
        );
        assert_eq!(REGISTRY.all().len(), 2);
        drop(a);
        assert_eq!((at(100), at(200)), (None, Some("b")));
        REGISTRY.remove(200);
        assert_eq!(at(200), None);
        assert!(!REGISTRY.is_empty());
        REGISTRY.remove(100);
        assert!(REGISTRY.is_empty());
    }
}
