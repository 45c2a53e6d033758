//! Newtypes for the numbers that must not be mixed up.

use serde::Serialize;
use std::fmt;

macro_rules! newtype {
    ($(#[$doc:meta])* $name:ident($inner:ty), $fmt:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize)]
        #[serde(transparent)]
        pub struct $name(pub $inner);
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, $fmt, self.0)
            }
        }
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }
        impl From<$inner> for $name {
            fn from(v: $inner) -> Self {
                Self(v)
            }
        }
    };
}

newtype!(
    /// A virtual address in a process. Old and new versions meet in one address space (the host), so one
    /// type serves both; names say `old_`/`new_` where it matters.
    Addr(u64), "{:#x}"
);
newtype!(
    /// An address in the space of an ELF file's `p_vaddr`/`st_value`: virtual address minus load bias.
    LinkAddr(u64), "link:{:#x}"
);
newtype!(
    /// A process id.
    Pid(i32), "{}"
);
newtype!(
    /// A thread id.
    Tid(i32), "{}"
);
newtype!(
    /// A file descriptor number in the target.
    Fd(i32), "{}"
);

impl Addr {
    /// `self + n`, wrapping like the machine does.
    #[must_use]
    #[allow(clippy::should_implement_trait)]
    pub fn add(self, n: u64) -> Self {
        Self(self.0.wrapping_add(n))
    }
    /// Distance from `start`, in bytes.
    #[must_use]
    pub fn since(self, start: Self) -> u64 {
        self.0.wrapping_sub(start.0)
    }
}

impl LinkAddr {
    /// The run-time address under a load bias.
    #[must_use]
    pub fn at(self, bias: Addr) -> Addr {
        Addr(self.0.wrapping_add(bias.0))
    }
}
