//! General registers in the order of `struct user_regs_struct` (arch/x86/include/asm/user_64.h).

use serde::Serialize;

macro_rules! regs {
    ($($name:ident),*) => {
        /// x86-64 general registers as ptrace(2) PTRACE_GETREGS shows them.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
        #[allow(missing_docs)]
        pub struct Regs { $(pub $name: u64),* }
        impl Regs {
            /// Names in kernel order.
            pub const NAMES: &'static [&'static str] = &[$(stringify!($name)),*];
            /// The 27 words in kernel order.
            #[must_use]
            pub fn to_words(&self) -> Vec<u64> {
                vec![$(self.$name),*]
            }
            /// From 27 words; `None` when the count is wrong.
            #[must_use]
            pub fn from_words(words: &[u64]) -> Option<Self> {
                let mut it = words.iter().copied();
                let r = Self { $($name: it.next()?),* };
                it.next().is_none().then_some(r)
            }
            /// The words, for editing in place (`NAMES` has the same order).
            pub fn words_mut(&mut self) -> Vec<&mut u64> {
                vec![$(&mut self.$name),*]
            }
        }
    };
}
regs!(
    r15, r14, r13, r12, rbp, rbx, r11, r10, r9, r8, rax, rcx, rdx, rsi, rdi, orig_rax, rip, cs, eflags, rsp,
    ss, fs_base, gs_base, ds, es, fs, gs
);

impl Regs {
    /// Index in DWARF's x86-64 numbering (System V ABI, figure 3.36): 0 rax, 1 rdx, 2 rcx, 3 rbx, 4 rsi,
    /// 5 rdi, 6 rbp, 7 rsp, 8–15 r8–r15, 16 return address.
    #[must_use]
    pub fn dwarf(&self) -> [u64; 17] {
        [
            self.rax, self.rdx, self.rcx, self.rbx, self.rsi, self.rdi, self.rbp, self.rsp, self.r8, self.r9,
            self.r10, self.r11, self.r12, self.r13, self.r14, self.r15, self.rip,
        ]
    }
    /// Names of `dwarf()`'s entries.
    pub const DWARF_NAMES: [&'static str; 17] = [
        "rax", "rdx", "rcx", "rbx", "rsi", "rdi", "rbp", "rsp", "r8", "r9", "r10", "r11", "r12", "r13",
        "r14", "r15", "rip",
    ];
}
