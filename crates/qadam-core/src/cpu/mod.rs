//! The CPU back end: the same bits from scalar code, AVX2, AVX-512 and any number of threads.
//!
//! * `scalar` is the definition, written with [`rule`](crate::rule) and
//!   [`codec`](crate::codec) alone;
//! * `simd` is the one vector kernel, over the operations that `avx2` and `avx512` supply;
//! * `huge` asks for the pages that suit the one long read that a step is;
//! * `measure` finds what must be known of a whole tensor before any of it is written;
//! * `prefetch` asks for memory ahead;
//! * [`run`] cuts tensors into chunks of whole blocks and hands them to the threads of [`pool`], which start
//!   on other `cores` than the caller's;
//! * [`Trial`] finds out whether something makes a program faster.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod cores;
mod folds;
pub(crate) mod huge;
mod kernels;
mod measure;
mod norm;
pub mod pool;
mod prefetch;
mod run;
mod scalar;
#[cfg(target_arch = "x86_64")]
mod simd;
mod trial;

use std::sync::OnceLock;

pub use huge::{advise_huge_pages, move_into_huge_pages};
pub use norm::squared_norms;
pub use run::{check, count_nonfinite, disjoint_waves, run};
pub use trial::Trial;

use crate::error::{Error, Result};

/// An instruction set; all give the same bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Backend {
    /// Plain Rust: the definition.
    Scalar,
    /// 8 lanes: AVX2, FMA and F16C.
    Avx2,
    /// 16 lanes: AVX-512 F, BW, DQ and VL.
    Avx512,
    /// The same and VBMI, which looks bytes up: Ice Lake, Zen 4 and later.
    Avx512Vbmi,
}

impl Backend {
    /// From the plainest to the widest.
    pub const ALL: [Self; 4] = [Self::Scalar, Self::Avx2, Self::Avx512, Self::Avx512Vbmi];

    /// The name that `QADAM_CPU` accepts.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Scalar => "scalar",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
            Self::Avx512Vbmi => "avx512vbmi",
        }
    }

    /// Whether this processor has the instructions.
    #[must_use]
    pub fn is_available(self) -> bool {
        match self {
            Self::Scalar => true,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => {
                is_x86_feature_detected!("avx2")
                    && is_x86_feature_detected!("fma")
                    && is_x86_feature_detected!("f16c")
            }
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => {
                Self::Avx2.is_available()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
            }
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Vbmi => {
                Self::Avx512.is_available() && is_x86_feature_detected!("avx512vbmi")
            }
            #[cfg(not(target_arch = "x86_64"))]
            Self::Avx2 | Self::Avx512 | Self::Avx512Vbmi => false,
        }
    }

    /// The back ends that this processor can run.
    pub fn available() -> impl Iterator<Item = Self> {
        Self::ALL.into_iter().filter(|backend| backend.is_available())
    }

    /// The back end in use: the one that the environment variable `QADAM_CPU` names, else the
    /// widest that the processor has. Decided at the first call.
    ///
    /// # Errors
    /// [`Error::Backend`] where the variable names one that is not there.
    pub fn current() -> Result<Self> {
        static CURRENT: OnceLock<Result<Backend>> = OnceLock::new();
        CURRENT.get_or_init(|| Self::choose(variable("QADAM_CPU").as_deref())).clone()
    }

    fn choose(name: Option<&str>) -> Result<Self> {
        let Some(value) = name.filter(|name| !name.is_empty()) else {
            return Ok(Self::available().last().unwrap_or(Self::Scalar));
        };
        Self::available().find(|backend| backend.name() == value).ok_or_else(|| Error::Backend {
            value: value.to_owned(),
            accepted: Self::available().map(Self::name).collect::<Vec<_>>().join(", "),
        })
    }
}

/// An environment variable; what is not Unicode in it becomes U+FFFD, which no setting accepts.
fn variable(name: &str) -> Option<String> {
    Some(std::env::var_os(name)?.to_string_lossy().into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_chooses_and_an_unknown_one_is_an_error() {
        assert_eq!(Backend::choose(Some("scalar")), Ok(Backend::Scalar));
        assert_eq!(Backend::choose(None), Ok(Backend::available().last().unwrap()));
        let text = Backend::choose(Some("neon")).unwrap_err().to_string();
        assert!(text.starts_with("QADAM_CPU is \"neon\"; this machine accepts scalar"), "{text}");
    }
}
