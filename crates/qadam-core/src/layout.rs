//! Where the elements of a parameter and its gradient lie, in the parameter's memory order.
//!
//! Moments are stored densely in the order in which the parameter's elements follow each other in
//! memory, so a transposed or `channels_last` parameter is as fast as a contiguous one. The
//! gradient may have any strides. [`Walk`] joins the two: it is flat wherever both run through
//! memory alike, and otherwise says how to gather.

use crate::error::{Error, Result};

/// A dimension of both tensors; strides are in elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Dim {
    size: usize,
    param: isize,
    grad: isize,
}

/// The elements of a parameter in memory order, each with its gradient's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Walk {
    len: usize,
    /// From the outermost dimension to the innermost; empty where both tensors are dense and
    /// alike.
    dims: Vec<Dim>,
}

/// Elements at a constant distance from each other in both tensors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Run {
    pub param: isize,
    pub grad: isize,
    pub param_stride: isize,
    pub grad_stride: isize,
    pub len: usize,
}

/// The dimensions of more than one element, outermost first in memory, if they have distinct
/// elements. `None` where the tensor is empty.
fn memory_order(
    what: &'static str,
    shape: &[usize],
    strides: &[isize],
) -> Result<Option<Vec<usize>>> {
    if shape.len() != strides.len() {
        let (sizes, strides) = (shape.len(), strides.len());
        return Err(Error::Rank { what, sizes, strides });
    }
    if shape.contains(&0) {
        return Ok(None);
    }
    let mut order: Vec<usize> = (0..shape.len()).filter(|&d| shape[d] > 1).collect();
    order.sort_by_key(|&d| std::cmp::Reverse(strides[d]));
    let mut span = 0_isize; // distance from the first element to the last, inner dimensions only
    for &d in order.iter().rev() {
        if strides[d] <= span {
            let (shape, strides) = (shape.to_vec(), strides.to_vec());
            return Err(Error::Overlap { what, shape, strides });
        }
        span += strides[d] * (shape[d] as isize - 1);
    }
    Ok(Some(order))
}

/// Checks that each element of a parameter has an address of its own.
///
/// # Errors
/// [`Error::Overlap`] for expanded or overlapping strides, [`Error::Rank`] for unequal ranks.
pub fn check_distinct(shape: &[usize], strides: &[isize]) -> Result<()> {
    memory_order("the parameter", shape, strides).map(|_| ())
}

/// Whether a tensor of these `strides` is dense and in the memory order of a parameter of this
/// `shape` and `param_strides`, as its state must be.
///
/// # Errors
/// As [`check_distinct`], for the parameter.
pub fn is_dense_like(shape: &[usize], param_strides: &[isize], strides: &[isize]) -> Result<bool> {
    let Some(order) = memory_order("the parameter", shape, param_strides)? else {
        return Ok(true);
    };
    if strides.len() != shape.len() {
        return Ok(false);
    }
    let mut expected = 1_isize;
    for &d in order.iter().rev() {
        if strides[d] != expected {
            return Ok(false);
        }
        expected *= shape[d] as isize;
    }
    Ok(true)
}

impl Walk {
    /// Both tensors dense, in the same order.
    #[must_use]
    pub const fn flat(len: usize) -> Self {
        Self { len, dims: Vec::new() }
    }

    /// Joins a parameter and its gradient, both of `shape`; strides are in elements. The gradient
    /// is only read, so its elements may overlap.
    ///
    /// # Errors
    /// [`Error::Overlap`] where two elements of the parameter share an address, [`Error::Rank`]
    /// where the ranks differ.
    pub fn new(shape: &[usize], param_strides: &[isize], grad_strides: &[isize]) -> Result<Self> {
        if grad_strides.len() != shape.len() {
            let (sizes, strides) = (shape.len(), grad_strides.len());
            return Err(Error::Rank { what: "the gradient", sizes, strides });
        }
        let Some(order) = memory_order("the parameter", shape, param_strides)? else {
            return Ok(Self::flat(0));
        };
        let mut dims: Vec<Dim> = Vec::with_capacity(order.len());
        for d in order {
            let inner = Dim { size: shape[d], param: param_strides[d], grad: grad_strides[d] };
            let length = inner.size as isize;
            match dims.last_mut() {
                Some(outer)
                    if outer.param == inner.param * length && outer.grad == inner.grad * length =>
                {
                    *outer = Dim { size: outer.size * inner.size, ..inner };
                }
                _ => dims.push(inner),
            }
        }
        let len = shape.iter().product();
        if let [Dim { param: 1, grad: 1, .. }] = dims[..] {
            dims.clear();
        }
        Ok(Self { len, dims })
    }

    /// How many elements there are.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.len
    }

    /// Whether there is no element.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Whether element `i` of either tensor is at offset `i`.
    #[must_use]
    pub const fn is_flat(&self) -> bool {
        self.dims.is_empty()
    }

    /// The distance in elements from the parameter's first element to behind its last.
    #[must_use]
    pub fn param_span(&self) -> usize {
        if self.is_flat() {
            return self.len;
        }
        self.dims.iter().map(|d| d.param as usize * (d.size - 1)).sum::<usize>() + 1
    }

    /// Size, parameter stride and gradient stride of each dimension, innermost first; none where
    /// the walk is flat.
    pub(crate) fn dims(&self) -> impl ExactSizeIterator<Item = (usize, isize, isize)> + '_ {
        self.dims.iter().rev().map(|d| (d.size, d.param, d.grad))
    }

    /// Calls `visit` for the runs that make up elements `start..start + len`, in order.
    pub(crate) fn runs(&self, start: usize, len: usize, mut visit: impl FnMut(Run)) {
        debug_assert!(start + len <= self.len);
        let Some((inner, outer)) = self.dims.split_last() else {
            let at = start as isize;
            visit(Run { param: at, grad: at, param_stride: 1, grad_stride: 1, len });
            return;
        };
        let (mut at, end) = (start, start + len);
        while at < end {
            let first = at % inner.size;
            let mut rest = at / inner.size;
            let mut param = inner.param * first as isize;
            let mut grad = inner.grad * first as isize;
            for dim in outer.iter().rev() {
                let index = (rest % dim.size) as isize;
                rest /= dim.size;
                param += dim.param * index;
                grad += dim.grad * index;
            }
            let len = (inner.size - first).min(end - at);
            let (param_stride, grad_stride) = (inner.param, inner.grad);
            visit(Run { param, grad, param_stride, grad_stride, len });
            at += len;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Offsets of all elements, by the runs, taken in pieces of `step`.
    fn offsets(walk: &Walk, step: usize) -> Vec<(isize, isize)> {
        let mut out = Vec::new();
        for start in (0..walk.len()).step_by(step) {
            walk.runs(start, step.min(walk.len() - start), |run| {
                for i in 0..run.len as isize {
                    let at = (run.param + i * run.param_stride, run.grad + i * run.grad_stride);
                    out.push(at);
                }
            });
        }
        out
    }

    #[test]
    fn dense_tensors_of_any_order_are_flat() {
        for strides in [[12, 4, 1], [1, 2, 6], [4, 8, 1]] {
            let walk = Walk::new(&[2, 3, 4], &strides, &strides).unwrap();
            assert!(walk.is_flat(), "{strides:?}");
            assert_eq!((walk.len(), walk.param_span()), (24, 24));
        }
    }

    #[test]
    fn strided_walks_visit_every_element_once_in_memory_order() {
        let (shape, param, grad) = ([3, 4, 5], [1_isize, 40, 6], [20_isize, 5, 1]);
        let walk = Walk::new(&shape, &param, &grad).unwrap();
        assert!(!walk.is_flat());
        let mut want = Vec::new();
        for a in 0..3_isize {
            for b in 0..4_isize {
                for c in 0..5_isize {
                    want.push((a + 40 * b + 6 * c, 20 * a + 5 * b + c));
                }
            }
        }
        want.sort_unstable();
        for step in [1, 7, 60] {
            assert_eq!(offsets(&walk, step), want);
        }
        assert_eq!(walk.param_span() as isize, want.last().unwrap().0 + 1);
    }

    #[test]
    fn gradients_may_be_expanded_parameters_may_not() {
        let walk = Walk::new(&[2, 3], &[3, 1], &[0, 1]).unwrap();
        assert_eq!(offsets(&walk, 6)[3..], [(3, 0), (4, 1), (5, 2)]);
        for strides in [[0, 1], [2, 1], [1, 1]] {
            let error = Walk::new(&[2, 3], &strides, &[3, 1]).unwrap_err();
            assert!(matches!(error, Error::Overlap { .. }), "{strides:?}");
        }
    }

    #[test]
    fn empty_single_and_scalar_tensors() {
        assert!(Walk::new(&[2, 0], &[0, 1], &[0, 1]).unwrap().is_empty());
        assert_eq!(offsets(&Walk::new(&[1, 1], &[9, 7], &[3, 5]).unwrap(), 1), [(0, 0)]);
        assert_eq!(offsets(&Walk::new(&[], &[], &[]).unwrap(), 1), [(0, 0)]);
        assert!(matches!(Walk::new(&[1], &[], &[1]), Err(Error::Rank { .. })));
    }

    #[test]
    fn state_must_be_dense_in_the_parameters_order() {
        assert!(is_dense_like(&[2, 3], &[1, 2], &[1, 2]).unwrap());
        assert!(!is_dense_like(&[2, 3], &[1, 2], &[3, 1]).unwrap());
        assert!(is_dense_like(&[2, 3], &[10, 1], &[3, 1]).unwrap(), "a slice's state is dense");
        assert!(is_dense_like(&[1, 3], &[77, 1], &[5, 1]).unwrap(), "size 1 has no stride");
    }
}
