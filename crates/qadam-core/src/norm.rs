//! Sums of squares whose bits depend on nothing but the elements: the definition.
//!
//! A sum's rounding depends on its order, so the order is fixed: a *fold* of up to [`CHUNK`] values
//! adds every [`LANES`]-th of them in order, then adds the upper half of the lanes to the lower
//! until one is left. Gradients are cut into chunks from the first element in memory on; the sums of
//! the chunks are folded in turn, level by level, until one is left. Threads, vectors and warps only
//! decide who computes which fold.
//!
//! Everything is f64: squares of f32 are exact in it and do not overflow.

/// Values of a fold, at most.
pub const CHUNK: usize = 4096;
/// Sums that a fold keeps side by side: the lanes of a warp, or some vectors.
pub const LANES: usize = 32;

/// The lanes' sums of a fold.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Lanes([f64; LANES]);

impl Default for Lanes {
    fn default() -> Self {
        Self::ZERO
    }
}

impl Lanes {
    pub const ZERO: Self = Self([0.0; LANES]);

    /// Adds the squares of the next `LANES` values. One line, so that it becomes vector code where
    /// the caller enables an instruction set.
    #[inline(always)]
    pub fn add_squares(&mut self, values: &[f32; LANES]) {
        for (sum, &value) in self.0.iter_mut().zip(values) {
            *sum = f64::from(value).mul_add(f64::from(value), *sum);
        }
    }

    /// Adds the halves until one sum is left.
    #[inline(always)]
    pub fn total(mut self) -> f64 {
        let mut half = LANES / 2;
        while half > 0 {
            for lane in 0..half {
                self.0[lane] += self.0[lane + half];
            }
            half /= 2;
        }
        self.0[0]
    }
}

/// A fold of at most [`CHUNK`] values.
fn fold(values: &[f64]) -> f64 {
    let mut lanes = Lanes::ZERO;
    for values in values.chunks(LANES) {
        for (sum, value) in lanes.0.iter_mut().zip(values) {
            *sum += value;
        }
    }
    lanes.total()
}

/// Folds the sums of a gradient's chunks, in order, to the sum of its squares.
#[must_use]
pub fn total(chunks: &[f64]) -> f64 {
    if chunks.len() <= 1 {
        return chunks.first().copied().unwrap_or(0.0);
    }
    let next: Vec<f64> = chunks.chunks(CHUNK).map(fold).collect();
    total(&next)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_order_is_as_documented() {
        // distinct powers, so that another order would round otherwise
        let values: Vec<f64> = (0..70).map(|i| 1.1_f64.powi(i * 7 % 71 - 35)).collect();
        let lane = |l: usize| values[l..].iter().step_by(LANES).fold(0.0, |sum, x| sum + x);
        let mut sums: Vec<f64> = (0..LANES).map(lane).collect();
        while sums.len() > 1 {
            let upper = sums.split_off(sums.len() / 2);
            sums = sums.iter().zip(&upper).map(|(a, b)| a + b).collect();
        }
        assert_eq!(total(&values), sums[0]);
    }

    #[test]
    fn levels_add_up() {
        let ones = vec![1.0; CHUNK * 3 + 5];
        assert_eq!(total(&ones), ones.len() as f64);
        assert_eq!((total(&[]), total(&[3.5])), (0.0, 3.5));
    }
}
