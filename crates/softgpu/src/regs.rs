//! A warp's registers, one array of 32 lanes each, and which lanes of them hold a value.

/// Lanes in a warp.
pub const WARP: usize = 32;

/// All registers of one warp. 16-bit values live zero-extended in `w`.
#[derive(Clone, Debug, Default)]
pub struct Regs {
    /// 16- and 32-bit registers.
    pub w: Vec<[u32; WARP]>,
    /// 64-bit registers.
    pub q: Vec<[u64; WARP]>,
    /// Predicates, a bit a lane.
    pub p: Vec<u32>,
    /// Which lanes were written, for `w`, then `q`, then `p`.
    pub known: Vec<u32>,
}

/// Where a register lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Slot {
    /// In [`Regs::w`].
    W(u32),
    /// In [`Regs::q`].
    Q(u32),
    /// In [`Regs::p`].
    P(u32),
}

/// An operation on all lanes of a warp; the mask says whose results are kept.
pub type Alu = Box<dyn Fn(&mut Regs, u32) + Send + Sync>;

/// A lane's value in one of the register classes.
pub trait Lane: Copy + Default + Send + Sync + 'static {
    /// All lanes of a register.
    fn get(r: &Regs, i: u32) -> [Self; WARP];
    /// Writes the lanes in `mask`.
    fn put(r: &mut Regs, i: u32, v: &[Self; WARP], mask: u32);
    /// The index, if `s` is of this class.
    fn index(s: Slot) -> Option<u32>;
}

fn blend<T: Copy>(to: &mut [T; WARP], v: &[T; WARP], mask: u32) {
    if mask == u32::MAX {
        *to = *v;
    } else {
        for (l, (t, v)) in to.iter_mut().zip(v).enumerate() {
            if (mask >> l) & 1 == 1 {
                *t = *v;
            }
        }
    }
}

impl Lane for u32 {
    fn get(r: &Regs, i: u32) -> [u32; WARP] {
        r.w[i as usize]
    }
    fn put(r: &mut Regs, i: u32, v: &[u32; WARP], mask: u32) {
        blend(&mut r.w[i as usize], v, mask);
    }
    fn index(s: Slot) -> Option<u32> {
        if let Slot::W(i) = s { Some(i) } else { None }
    }
}

impl Lane for u64 {
    fn get(r: &Regs, i: u32) -> [u64; WARP] {
        r.q[i as usize]
    }
    fn put(r: &mut Regs, i: u32, v: &[u64; WARP], mask: u32) {
        blend(&mut r.q[i as usize], v, mask);
    }
    fn index(s: Slot) -> Option<u32> {
        if let Slot::Q(i) = s { Some(i) } else { None }
    }
}

impl Lane for bool {
    fn get(r: &Regs, i: u32) -> [bool; WARP] {
        let m = r.p[i as usize];
        std::array::from_fn(|l| (m >> l) & 1 == 1)
    }
    fn put(r: &mut Regs, i: u32, v: &[bool; WARP], mask: u32) {
        let mut m = 0;
        for (l, &b) in v.iter().enumerate() {
            m |= u32::from(b) << l;
        }
        let p = &mut r.p[i as usize];
        *p = (*p & !mask) | (m & mask);
    }
    fn index(s: Slot) -> Option<u32> {
        if let Slot::P(i) = s { Some(i) } else { None }
    }
}

/// One source.
pub fn op1<D: Lane, A: Lane>(d: u32, a: u32, f: impl Fn(A) -> D + Send + Sync + 'static) -> Alu {
    Box::new(move |r, mask| {
        let x = A::get(r, a);
        let out = std::array::from_fn(|l| f(x[l]));
        D::put(r, d, &out, mask);
    })
}

/// Two sources.
pub fn op2<D: Lane, A: Lane, B: Lane>(
    d: u32,
    (a, b): (u32, u32),
    f: impl Fn(A, B) -> D + Send + Sync + 'static,
) -> Alu {
    Box::new(move |r, mask| {
        let (x, y) = (A::get(r, a), B::get(r, b));
        let out = std::array::from_fn(|l| f(x[l], y[l]));
        D::put(r, d, &out, mask);
    })
}

/// Three sources.
pub fn op3<D: Lane, A: Lane, B: Lane, C: Lane>(
    d: u32,
    (a, b, c): (u32, u32, u32),
    f: impl Fn(A, B, C) -> D + Send + Sync + 'static,
) -> Alu {
    Box::new(move |r, mask| {
        let (x, y, z) = (A::get(r, a), B::get(r, b), C::get(r, c));
        let out = std::array::from_fn(|l| f(x[l], y[l], z[l]));
        D::put(r, d, &out, mask);
    })
}

/// Two results of three sources.
pub fn op3x2<D: Lane, E: Lane, A: Lane, B: Lane, C: Lane>(
    (d, e): (u32, u32),
    (a, b, c): (u32, u32, u32),
    f: impl Fn(A, B, C) -> (D, E) + Send + Sync + 'static,
) -> Alu {
    Box::new(move |r, mask| {
        let (x, y, z) = (A::get(r, a), B::get(r, b), C::get(r, c));
        let mut first = [D::default(); WARP];
        let mut second = [E::default(); WARP];
        for l in 0..WARP {
            (first[l], second[l]) = f(x[l], y[l], z[l]);
        }
        D::put(r, d, &first, mask);
        E::put(r, e, &second, mask);
    })
}

impl Regs {
    /// One lane of a register, widened.
    pub fn lane(&self, s: Slot, l: usize) -> u64 {
        match s {
            Slot::W(i) => u64::from(self.w[i as usize][l]),
            Slot::Q(i) => self.q[i as usize][l],
            Slot::P(i) => u64::from((self.p[i as usize] >> l) & 1),
        }
    }

    /// Writes one lane, cut to the register's width.
    pub fn set_lane(&mut self, s: Slot, l: usize, v: u64) {
        match s {
            Slot::W(i) => self.w[i as usize][l] = v as u32,
            Slot::Q(i) => self.q[i as usize][l] = v,
            Slot::P(i) => {
                let p = &mut self.p[i as usize];
                *p = (*p & !(1 << l)) | (((v & 1) as u32) << l);
            }
        }
    }

    /// The same value in every lane.
    pub fn fill(&mut self, s: Slot, v: u64) {
        match s {
            Slot::W(i) => self.w[i as usize] = [v as u32; WARP],
            Slot::Q(i) => self.q[i as usize] = [v; WARP],
            Slot::P(i) => self.p[i as usize] = if v & 1 == 1 { u32::MAX } else { 0 },
        }
    }

    /// Index of a register in [`Regs::known`].
    pub fn flat(&self, s: Slot) -> usize {
        match s {
            Slot::W(i) => i as usize,
            Slot::Q(i) => self.w.len() + i as usize,
            Slot::P(i) => self.w.len() + self.q.len() + i as usize,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masked_lanes_keep_their_values() {
        let mut r = Regs { w: vec![[1; 32], [2; 32], [9; 32]], p: vec![0], ..Regs::default() };
        op2::<u32, u32, u32>(2, (0, 1), |a, b| a + b)(&mut r, 0x0000_fffe);
        assert_eq!((r.w[2][0], r.w[2][1], r.w[2][16]), (9, 3, 9));
        op2::<bool, u32, u32>(0, (0, 1), |a, b| a < b)(&mut r, 0xf0);
        assert_eq!(r.p[0], 0xf0);
    }
}
