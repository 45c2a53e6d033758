//! The types, variables and functions of one program.

use mcr_image::LinkAddr;
use serde::Serialize;
use std::collections::HashMap;
use std::fmt;
use std::ops::Index;
use std::sync::Arc;

/// A name, shared between all that carry it.
pub type Name = Arc<str>;

/// A type of one [`TypeModel`]. `TypeId(0)` is `void`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Default)]
#[serde(transparent)]
pub struct TypeId(pub u32);

impl TypeId {
    /// `void`.
    pub const VOID: Self = Self(0);
}

impl fmt::Debug for TypeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "type#{}", self.0)
    }
}

/// What the bits of a base type mean.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
pub enum Encoding {
    /// `int`, `long`.
    Signed,
    /// `unsigned`, `uint8_t`.
    Unsigned,
    /// `char`, `signed char`.
    SignedChar,
    /// `unsigned char`.
    UnsignedChar,
    /// `_Bool`.
    Bool,
    /// `float`, `double`, `long double`.
    Float,
    /// `_Complex`.
    Complex,
    /// Anything else (decimal floats, UTF characters).
    Other,
}

impl Encoding {
    /// An integer, a character or a truth value.
    #[must_use]
    pub fn is_integer(self) -> bool {
        !matches!(self, Self::Float | Self::Complex | Self::Other)
    }
    /// Negative values exist.
    #[must_use]
    pub fn is_signed(self) -> bool {
        matches!(self, Self::Signed | Self::SignedChar)
    }
    /// Prints as a character.
    #[must_use]
    pub fn is_char(self) -> bool {
        matches!(self, Self::SignedChar | Self::UnsignedChar)
    }
}

/// `const`, `volatile`, `restrict`, `_Atomic`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[allow(missing_docs)]
pub enum Qualifier {
    Const,
    Volatile,
    Restrict,
    Atomic,
}

impl Qualifier {
    /// As written in C.
    #[must_use]
    pub fn keyword(self) -> &'static str {
        match self {
            Self::Const => "const",
            Self::Volatile => "volatile",
            Self::Restrict => "restrict",
            Self::Atomic => "_Atomic",
        }
    }
}

/// `struct` or `union`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[allow(missing_docs)]
pub enum RecordKind {
    Struct,
    Union,
}

impl RecordKind {
    /// As written in C.
    #[must_use]
    pub fn keyword(self) -> &'static str {
        match self {
            Self::Struct => "struct",
            Self::Union => "union",
        }
    }
}

/// Where a bit-field lies: little-endian bit numbers from the start of the record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
pub struct Bits {
    /// First bit, counted from the record's first byte.
    pub start: u64,
    /// Width in bits.
    pub width: u32,
}

/// A member of a struct or union.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// `None` for an anonymous struct or union.
    pub name: Option<Name>,
    /// Its type.
    pub ty: TypeId,
    /// Bytes from the start of the record (for a bit-field: of its first byte).
    pub offset: u64,
    /// Set for a bit-field.
    pub bits: Option<Bits>,
}

/// A struct or union.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// Which of the two.
    pub kind: RecordKind,
    /// Its tag.
    pub tag: Option<Name>,
    /// For a record without a tag: the typedef that names it.
    pub alias: Option<Name>,
    /// In bytes; 0 if incomplete.
    pub size: u64,
    /// In the order of the source.
    pub members: Vec<Member>,
    /// Only declared here, and no unique definition was found.
    pub incomplete: bool,
}

/// An enumeration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Enumeration {
    /// Its tag.
    pub tag: Option<Name>,
    /// For one without a tag: the typedef that names it.
    pub alias: Option<Name>,
    /// In bytes.
    pub size: u64,
    /// Negative values exist.
    pub signed: bool,
    /// In the order of the source.
    pub constants: Vec<(Name, i128)>,
    /// Only declared.
    pub incomplete: bool,
}

impl Enumeration {
    /// The first constant with a value.
    #[must_use]
    pub fn name_of(&self, value: i128) -> Option<&Name> {
        self.constants.iter().find(|c| c.1 == value).map(|c| &c.0)
    }
    /// The value of a constant.
    #[must_use]
    pub fn value_of(&self, name: &str) -> Option<i128> {
        self.constants.iter().find(|c| &*c.0 == name).map(|c| c.1)
    }
}

/// One type.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Type {
    /// `void`, and what the debug information does not say.
    Void,
    /// `int`, `double`, ….
    Base { name: Name, size: u64, encoding: Encoding },
    /// A pointer.
    Pointer(TypeId),
    /// A struct or union.
    Record(Record),
    /// An enumeration.
    Enum(Enumeration),
    /// An array; `count: None` for a flexible or zero-length one. Vectors are arrays, too.
    Array { element: TypeId, count: Option<u64> },
    /// A typedef.
    Typedef { name: Name, to: TypeId },
    /// A qualified type.
    Qualified { qualifier: Qualifier, to: TypeId },
    /// A function.
    Function { result: TypeId, params: Vec<TypeId>, variadic: bool },
}

/// Where a variable lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub enum VarPlace {
    /// In the program's data.
    Link(LinkAddr),
    /// In each thread's copy of the program's TLS segment, at this offset from its start.
    Tls(u64),
}

impl VarPlace {
    /// The address of a variable that is not thread-local.
    #[must_use]
    pub fn link(self) -> Option<LinkAddr> {
        match self {
            Self::Link(a) => Some(a),
            Self::Tls(_) => None,
        }
    }
    /// The offset of a thread-local variable.
    #[must_use]
    pub fn tls(self) -> Option<u64> {
        match self {
            Self::Tls(o) => Some(o),
            Self::Link(_) => None,
        }
    }
}

/// A variable with static storage: a global, a `static` of a file or function, or a thread-local.
#[derive(Clone, Debug)]
pub struct Variable {
    /// Its name.
    pub name: Name,
    /// Source file of the unit that defines it, relative to the build directory where possible.
    pub unit: Name,
    /// The function whose `static` it is.
    pub function: Option<Name>,
    /// Tells apart same-named statics in different blocks of one function: 0, 1, … by line.
    pub ordinal: u32,
    /// Its type.
    pub ty: TypeId,
    /// Where it lives.
    pub place: VarPlace,
    /// In bytes: of the type, or more where the initialiser fills a flexible array.
    pub size: u64,
    /// Visible to other units.
    pub external: bool,
    /// Where it is declared.
    pub decl_file: Option<Name>,
    /// Line of the declaration, 0 if unknown.
    pub line: u32,
}

impl Variable {
    /// `name`, or `function::name`, for people.
    #[must_use]
    pub fn display(&self) -> String {
        match &self.function {
            Some(f) => format!("{f}::{}", self.name),
            None => self.name.to_string(),
        }
    }
}

/// A function that the program defines.
#[derive(Clone, Debug)]
pub struct Function {
    /// Its name in the source.
    pub name: Name,
    /// Source file of the unit that defines it.
    pub unit: Name,
    /// Code, half open; empty if it only exists inlined. The first range holds the entry point.
    pub ranges: Vec<(LinkAddr, LinkAddr)>,
    /// Visible to other units.
    pub external: bool,
    /// Line of the declaration, 0 if unknown.
    pub line: u32,
    /// Where its debug information starts, for [`TypeModel::locals_at`].
    pub(super) die: u64,
}

impl Function {
    /// Its code holds the address.
    #[must_use]
    pub fn contains(&self, a: LinkAddr) -> bool {
        self.ranges.iter().any(|r| r.0 <= a && a < r.1)
    }
}

/// Synchronisation objects, by the typedef that names them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[allow(missing_docs)]
pub enum SyncKind {
    Mutex,
    Cond,
    RwLock,
    Spin,
    Barrier,
    Once,
    Semaphore,
}

impl SyncKind {
    /// From a typedef's name.
    #[must_use]
    pub fn from_typedef(name: &str) -> Option<Self> {
        Some(match name {
            "pthread_mutex_t" | "mtx_t" => Self::Mutex,
            "pthread_cond_t" | "cnd_t" => Self::Cond,
            "pthread_rwlock_t" => Self::RwLock,
            "pthread_spinlock_t" => Self::Spin,
            "pthread_barrier_t" => Self::Barrier,
            "pthread_once_t" | "once_flag" => Self::Once,
            "sem_t" => Self::Semaphore,
            _ => return None,
        })
    }
}

/// All types, static variables and functions of one program, read from its DWARF.
#[derive(Debug, Default)]
pub struct TypeModel {
    pub(super) types: Vec<Type>,
    /// Size of each type; filled once, safe against nonsense in the file.
    pub(super) sizes: Vec<u64>,
    /// Unit in which a type was first seen.
    pub(super) type_units: Vec<u32>,
    pub(super) unit_names: Vec<Name>,
    pub(super) globals: Vec<Variable>,
    pub(super) functions: Vec<Function>,
    /// "struct foo", "union foo", "enum foo" or a typedef's name → definitions.
    pub(super) by_name: HashMap<String, Vec<TypeId>>,
    pub(super) globals_by_name: HashMap<Name, Vec<usize>>,
    pub(super) functions_by_name: HashMap<Name, Vec<usize>>,
    /// (start, end, index in `functions`), by start.
    pub(super) function_ranges: Vec<(u64, u64, u32)>,
    /// Index of globals with a link address, by it.
    pub(super) globals_by_addr: Vec<usize>,
    /// Debug-information entry → type, by entry.
    pub(super) dies: Vec<(u64, TypeId)>,
    pub(super) sections: super::sections::Sections,
    pub(super) path: String,
}

impl Index<TypeId> for TypeModel {
    type Output = Type;
    fn index(&self, id: TypeId) -> &Type {
        self.types.get(id.0 as usize).unwrap_or(&Type::Void)
    }
}

impl TypeModel {
    /// How many types there are; ids run from 0 (`void`) to this.
    #[must_use]
    pub fn len(&self) -> usize {
        self.types.len()
    }
    /// No types at all.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.types.is_empty()
    }
    /// The file it was read from.
    #[must_use]
    pub fn path(&self) -> &str {
        &self.path
    }
    /// Every id.
    pub fn ids(&self) -> impl Iterator<Item = TypeId> + use<> {
        (0..self.types.len() as u32).map(TypeId)
    }
    /// Every variable with static storage, in the order of the units.
    #[must_use]
    pub fn globals(&self) -> &[Variable] {
        &self.globals
    }
    /// Every function that is defined here.
    #[must_use]
    pub fn functions(&self) -> &[Function] {
        &self.functions
    }
    /// Source files of the units.
    #[must_use]
    pub fn units(&self) -> &[Name] {
        &self.unit_names
    }
    /// Variables of a name: several where statics share it.
    pub fn globals_named<'a>(&'a self, name: &str) -> impl Iterator<Item = &'a Variable> + use<'a> {
        let found = self.globals_by_name.get(name);
        found.into_iter().flatten().map(|&i| &self.globals[i])
    }
    /// The variable of a name: the external one, or the only one.
    #[must_use]
    pub fn global(&self, name: &str) -> Option<&Variable> {
        let all: Vec<_> = self.globals_named(name).collect();
        let external = all.iter().find(|v| v.external && v.function.is_none());
        external.or(all.first().filter(|_| all.len() == 1)).copied()
    }
    /// The variable whose bytes hold an address.
    #[must_use]
    pub fn global_at(&self, a: LinkAddr) -> Option<&Variable> {
        let start = |i: usize| self.globals[i].place.link().unwrap_or_default();
        let n = self.globals_by_addr.partition_point(|&i| start(i) <= a);
        let v = &self.globals[*self.globals_by_addr.get(n.checked_sub(1)?)?];
        (a.0 - start(self.globals_by_addr[n - 1]).0 < v.size.max(1)).then_some(v)
    }
    /// Functions of a name.
    pub fn functions_named<'a>(&'a self, name: &str) -> impl Iterator<Item = &'a Function> + use<'a> {
        let found = self.functions_by_name.get(name);
        found.into_iter().flatten().map(|&i| &self.functions[i])
    }
    /// The function whose code holds an address. For the frame of a caller pass `pc - 1`.
    #[must_use]
    pub fn function_at(&self, a: LinkAddr) -> Option<&Function> {
        let n = self.function_ranges.partition_point(|r| r.0 <= a.0);
        let r = self.function_ranges[..n].iter().rev().take(8).find(|r| a.0 < r.1)?;
        self.functions.get(r.2 as usize)
    }
    /// Every definition of "struct foo", "union foo", "enum foo" or of a typedef "foo_t".
    #[must_use]
    pub fn find_types(&self, name: &str) -> &[TypeId] {
        let squeezed = name.split_whitespace().collect::<Vec<_>>().join(" ");
        self.by_name.get(&squeezed).map_or(&[], Vec::as_slice)
    }
    /// A type by its C name, with trailing `*` and `[n]`; "foo" also finds "struct foo", "union foo" and
    /// "enum foo". Among several definitions it takes the first complete one.
    #[must_use]
    pub fn find_type(&self, name: &str) -> Option<TypeId> {
        let name = name.trim();
        let forms =
            [name.to_owned(), format!("struct {name}"), format!("union {name}"), format!("enum {name}")];
        forms.iter().find_map(|n| {
            let all = self.find_types(n);
            let complete = all.iter().find(|&&t| !self.is_incomplete(t));
            complete.or(all.first()).copied()
        })
    }
    /// Only declared.
    #[must_use]
    pub fn is_incomplete(&self, id: TypeId) -> bool {
        match &self[self.resolve(id)] {
            Type::Record(r) => r.incomplete,
            Type::Enum(e) => e.incomplete,
            Type::Void | Type::Function { .. } => true,
            _ => false,
        }
    }
    /// In bytes. 0 for void, functions, incomplete types and flexible arrays.
    #[must_use]
    pub fn size_of(&self, id: TypeId) -> u64 {
        self.sizes.get(id.0 as usize).copied().unwrap_or(0)
    }
    /// The type behind typedefs and qualifiers.
    #[must_use]
    pub fn resolve(&self, mut id: TypeId) -> TypeId {
        // Chains are finite: cycles are cut when the model is read.
        while let Type::Typedef { to, .. } | Type::Qualified { to, .. } = &self[id] {
            id = *to;
        }
        id
    }
    /// The type behind qualifiers only.
    #[must_use]
    pub fn unqualified(&self, mut id: TypeId) -> TypeId {
        while let Type::Qualified { to, .. } = &self[id] {
            id = *to;
        }
        id
    }
    /// The type behind typedefs and qualifiers.
    #[must_use]
    pub fn strip(&self, id: TypeId) -> &Type {
        &self[self.resolve(id)]
    }
    /// What a pointer points to.
    #[must_use]
    pub fn pointee(&self, id: TypeId) -> Option<TypeId> {
        match self.strip(id) {
            Type::Pointer(to) => Some(*to),
            _ => None,
        }
    }
    /// The struct or union behind typedefs and qualifiers.
    #[must_use]
    pub fn record(&self, id: TypeId) -> Option<&Record> {
        match self.strip(id) {
            Type::Record(r) => Some(r),
            _ => None,
        }
    }
    /// A pointer to a function.
    #[must_use]
    pub fn is_function_pointer(&self, id: TypeId) -> bool {
        self.pointee(id).is_some_and(|t| matches!(self.strip(t), Type::Function { .. }))
    }
    /// Names of the typedefs from `id` down to its resolved type.
    pub fn typedef_names(&self, mut id: TypeId) -> impl Iterator<Item = &Name> {
        std::iter::from_fn(move || {
            loop {
                match &self[id] {
                    Type::Typedef { name, to } => {
                        id = *to;
                        return Some(name);
                    }
                    Type::Qualified { to, .. } => id = *to,
                    _ => return None,
                }
            }
        })
    }
    /// A mutex, condition variable, … by the name of one of its typedefs.
    #[must_use]
    pub fn sync_kind(&self, id: TypeId) -> Option<SyncKind> {
        self.typedef_names(id).find_map(|n| SyncKind::from_typedef(n)).or_else(|| match self.strip(id) {
            Type::Record(Record { alias: Some(a), .. }) => SyncKind::from_typedef(a),
            _ => None,
        })
    }
    /// `pthread_t` (or C11's `thrd_t`).
    #[must_use]
    pub fn is_pthread_t(&self, id: TypeId) -> bool {
        self.typedef_names(id).any(|n| matches!(&**n, "pthread_t" | "thrd_t"))
    }
    /// `pid_t`.
    #[must_use]
    pub fn is_pid_t(&self, id: TypeId) -> bool {
        self.typedef_names(id).any(|n| matches!(&**n, "pid_t" | "__pid_t"))
    }
    /// The type of a debug-information entry.
    pub(super) fn type_of_die(&self, die: u64) -> Option<TypeId> {
        let i = self.dies.binary_search_by_key(&die, |d| d.0).ok()?;
        Some(self.dies[i].1)
    }
}
