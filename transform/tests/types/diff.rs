use crate::support::{Workshop, load};
use mcr_image::Addr;
use mcr_image::elf::ElfFile;
use mcr_plugin::Rules;
use mcr_transform::types::{ChangeKind, Converted, LayoutDiff, SlotKind, TypeId, TypeModel};
use std::path::Path;

/// Type, offset, bits of a member.
type Found = (TypeId, u64, Option<(u64, u64)>);

/// Two versions and the bytes of old's variable `v`.
struct Pair {
    _w: Workshop,
    old: TypeModel,
    new: TypeModel,
    bytes: Vec<u8>,
    rules: Rules,
}

fn pair(old: &str, new: &str, rules: &str) -> Pair {
    let w = Workshop::new();
    let tail = "\nint main(void) { return 0; }\n";
    let build = |n: &str, t: &str| {
        w.build(
            n,
            &[(
                &format!("{n}.c"),
                &format!("#include <stdint.h>\n#include <stddef.h>\n#include <pthread.h>\n{t}{tail}"),
            )],
            &["-g"],
        )
    };
    let (a, b) = (build("old", old), build("new", new));
    let elf = ElfFile::open(&a).unwrap();
    let (old, new) = (load(&a), load(&b));
    let v = old.global("v").unwrap();
    let bytes = elf.initial_bytes(v.place.link().unwrap(), v.size as usize, Addr(0)).unwrap().bytes;
    Pair { old, new, bytes, rules: Rules::parse(rules, Path::new("r.toml")).unwrap(), _w: w }
}

impl Pair {
    fn diff(&self) -> LayoutDiff<'_> {
        LayoutDiff::new(&self.old, &self.new, &self.rules)
    }
    fn types(&self) -> (TypeId, TypeId) {
        (self.old.global("v").unwrap().ty, self.new.global("v").unwrap().ty)
    }
    fn convert(&self) -> Converted {
        let (o, n) = self.types();
        self.diff().convert(o, n, &self.bytes)
    }
    /// Little-endian value of a member of the new `v`.
    fn get(&self, c: &Converted, path: &str) -> u64 {
        let mut ty = self.types().1;
        let mut at = 0;
        let mut bits = None;
        for step in path.split('.') {
            let (ty2, off, b) = self.member(ty, step).unwrap_or_else(|| panic!("{path}"));
            (ty, at, bits) = (ty2, at + off, b);
        }
        match bits {
            Some((start, width)) => (0..width)
                .map(|i| u64::from(c.bytes[((start + i) / 8) as usize] >> ((start + i) % 8) & 1) << i)
                .sum(),
            None => (0..self.new.size_of(ty).min(8))
                .map(|i| u64::from(c.bytes[(at + i) as usize]) << (8 * i))
                .sum(),
        }
    }
    fn member(&self, ty: TypeId, name: &str) -> Option<Found> {
        self.new.record(ty)?.members.iter().find_map(|m| match m.name.as_deref() {
            Some(n) if n == name => Some((m.ty, m.offset, m.bits.map(|b| (b.start, u64::from(b.width))))),
            None => self.member(m.ty, name).map(|(t, o, b)| (t, o + m.offset, b)),
            _ => None,
        })
    }
    fn kinds(&self, name: &str) -> Vec<ChangeKind> {
        let all = self.diff().changes();
        let t = all.iter().find(|t| t.name == name);
        t.map(|t| t.changes.iter().map(|c| c.kind).collect()).unwrap_or_default()
    }
}

#[test]
fn members_travel_by_name() {
    let p = pair(
        "struct in { char c; int n; };
         struct s { int a; char *name; unsigned char small; short neg; struct in in[2]; float f; int gone; struct s *next; } ;
         struct s v = { 1, (char *)0x1234, 200, -5, {{'x', 7}, {'y', -8}}, 1.5f, 99, &v };",
        "struct in { int n; char c; long extra; };
         struct s { long fresh; struct s *next; long neg; int a; unsigned small; struct in in[3]; double f; char *name; };
         struct s v;",
        "",
    );
    let c = p.convert();
    assert!(c.is_ok(), "{c:?}");
    assert_eq!(c.bytes.len() as u64, p.new.size_of(p.types().1));
    assert_eq!((p.get(&c, "a"), p.get(&c, "name"), p.get(&c, "small")), (1, 0x1234, 200));
    assert_eq!(p.get(&c, "neg") as i64, -5);
    assert_eq!(f64::from_bits(p.get(&c, "f")), 1.5);
    let (_, at, _) = p.member(p.types().1, "in").unwrap();
    let at = at as usize;
    assert_eq!((c.bytes[at], c.bytes[at + 4], c.bytes[at + 16], c.bytes[at + 20]), (7, b'x', 0xf8, b'y'));
    let native: Vec<&str> = c.native.iter().map(|n| n.path.as_str()).collect();
    assert!(
        native.contains(&"fresh") && native.contains(&"in[1].extra") && native.contains(&"in"),
        "{native:?}"
    );
    assert_eq!((c.dropped[0].path.as_str(), c.dropped[0].value[0], c.dropped.len()), ("gone", 99, 1));
    let d = p.diff();
    let (o, n) = p.types();
    assert!(!d.same_layout(o, n) && d.pair(o) == Some(n) && d.pair_back(n) == Some(o));

    // Pointers: where the slots went, and inner addresses.
    let moves = d.pointer_moves(o, n).unwrap();
    let to = |f: &str| p.member(n, f).unwrap().1;
    let name = moves.iter().find(|m| m.old_offset == 8).unwrap();
    assert_eq!(name.new_offset, Some(to("name")));
    let next =
        moves.iter().find(|m| matches!(m.kind, SlotKind::Pointer(t) if p.old.resolve(t) == o)).unwrap();
    assert_eq!((next.new_offset, next.new_pointee), (Some(to("next")), Some(n)));
    assert_eq!(d.map_offset(o, n, 0, Some(o)), Some(0));
    let int = p.old.find_type("int").unwrap();
    let inner = p.old.find_type("struct in").unwrap();
    // v.in[1] and v.in[1].n
    assert_eq!(d.map_offset(o, n, 28, Some(inner)), Some(to("in") + 16));
    assert_eq!(d.map_offset(o, n, 32, None), Some(to("in") + 16));
    let _ = int;
    assert_eq!(d.map_offset(o, n, 16, None), Some(to("small")));
    assert_eq!(d.map_offset(o, n, 40, None), None, "a dropped member has no place");
}

#[test]
fn the_silent_killers_come_first() {
    let p = pair(
        "enum e { A, B, C }; struct pad { char c; int i; }; struct swap { int x; int y; }; struct sign { int n; };
         struct grow { int n; }; struct quiet { int n; }; struct bits { unsigned a:3, b:5; };
         union u { int i; char b[8]; }; struct tgt { struct quiet *p; };
         struct v { enum e e; struct pad pad; struct swap swap; struct sign sign; struct grow grow; struct quiet q; struct bits bits; union u u; struct tgt t; } v;",
        "enum e { C, A, B, D }; struct pad { char c; char mode; int i; }; struct swap { int x; int z; }; struct sign { unsigned n; };
         struct grow { int n; long more; }; struct quiet { int n; }; struct bits { unsigned a:4, b:4; };
         union u { int i; char *p; }; struct tgt { struct grow *p; };
         struct v { enum e e; struct pad pad; struct swap swap; struct sign sign; struct grow grow; struct quiet q; struct bits bits; union u u; struct tgt t; } v;",
        "",
    );
    let d = p.diff();
    let all = d.changes();
    let get = |n: &str| all.iter().find(|t| t.name == n).unwrap_or_else(|| panic!("{n}"));
    for (n, k) in [
        ("enum e", ChangeKind::EnumRenumbered),
        ("struct pad", ChangeKind::PaddingBecameField),
        ("struct swap", ChangeKind::SameSizeOtherMeaning),
        ("struct sign", ChangeKind::SignednessChanged),
        ("struct bits", ChangeKind::BitfieldMoved),
        ("union u", ChangeKind::UnionChanged),
    ] {
        assert!(get(n).silent, "{n}");
        assert_eq!(get(n).changes[0].kind, k, "{n}: {:?}", get(n));
    }
    assert!(!get("struct grow").silent && get("struct grow").layout_changed);
    assert!(
        !get("struct tgt").layout_changed
            && get("struct tgt").changes[0].kind == ChangeKind::PointerTargetChanged
    );
    assert!(all.iter().all(|t| t.name != "struct quiet"));
    let first_loud = all.iter().position(|t| !t.silent).unwrap();
    assert!(all[first_loud..].iter().all(|t| !t.silent));
    let text = &get("struct pad").changes[0].text;
    assert!(text.contains("char mode") && text.contains("padding") && text.contains("offset 1"), "{text}");
    assert!(d.same_layout(p.old.find_type("struct sign").unwrap(), p.new.find_type("struct sign").unwrap()));
    assert_eq!(p.kinds("struct grow"), [ChangeKind::Added]);
}

#[test]
fn enums_travel_by_constant() {
    let p = pair(
        "enum e { A, B, C }; struct v { enum e e[3]; } v = { { C, A, B } };",
        "enum e { Z, C, A, B }; struct v { enum e e[3]; } v;",
        "",
    );
    let c = p.convert();
    assert!(c.is_ok());
    assert_eq!(c.bytes.chunks(4).map(|b| b[0]).collect::<Vec<_>>(), [1, 2, 3]);

    let gone = pair(
        "enum e { A, B, C }; struct v { enum e e; } v = { C };",
        "enum e { B, A }; struct v { enum e e; } v;",
        "",
    );
    let c = gone.convert();
    assert!(
        !c.is_ok() && c.problems[0].code == "enum-removed" && c.problems[0].message.contains("constant C"),
        "{c:?}"
    );
}

#[test]
fn what_does_not_fit_is_refused() {
    let p = pair("struct v { long n; int ok; } v = { 70000, 12 };", "struct v { short n; char ok; } v;", "");
    let c = p.convert();
    assert_eq!(c.problems.len(), 1);
    let q = &c.problems[0];
    assert!(q.refusal && q.code == "narrowed" && q.path == "n" && q.message.contains("70000"), "{q:?}");
    assert!(q.next_step.contains("[values]") && q.next_step.contains("\"struct v.n\""), "{q:?}");
    assert_eq!(p.get(&c, "ok"), 12);

    let p = pair("struct v { char *s; } v;", "struct v { int s; } v;", "");
    assert_eq!(p.convert().problems[0].code, "kind-changed");
    let p = pair(
        "struct v { char s[8]; int a[4]; } v = { \"abc\", {1, 2, 0, 0} };",
        "struct v { char s[4]; int a[2]; } v;",
        "",
    );
    assert!(p.convert().is_ok());
    let p = pair(
        "struct v { char s[8]; int a[4]; } v = { \"abcdef\", {1, 2, 0, 4} };",
        "struct v { char s[4]; int a[2]; } v;",
        "",
    );
    assert_eq!(p.convert().problems.iter().map(|p| p.code).collect::<Vec<_>>(), ["array-shrunk"; 2]);
}

#[test]
fn bitfields_move_and_grow() {
    let p = pair(
        "struct v { unsigned a:3; signed b:5; unsigned c:20; int plain; } v = { 5, -9, 0xabcde, 7 };",
        "struct v { unsigned new1:1; unsigned c:24; unsigned a:7; int b; int plain:9; } v;",
        "",
    );
    let c = p.convert();
    assert!(c.is_ok(), "{c:?}");
    assert_eq!((p.get(&c, "a"), p.get(&c, "c"), p.get(&c, "plain")), (5, 0xabcde, 7));
    assert_eq!(p.get(&c, "b") as i32, -9);
    assert!(c.native.is_empty(), "shares its byte with an old member");
}

#[test]
fn rules_rename_compute_and_explain() {
    let p = pair(
        "struct conn { int timeout; int old_name; char *in; int in_len; struct { int soft, hard; } lim; enum k { STR, NUM } kind; union { char *str; long num; } u; };
         struct conn v = { 30, 5, (char *)0x99, 3, {1, 2}, NUM, { .num = 77 } };",
        "struct buf { long len; char *data; }; struct client { struct buf in; long timeout_ms; int new_name; int quota; int soft; struct { int hard; } lim; enum k { STR, NUM } kind; union { double d; struct { int x; char *str; }; int num; char big[32]; } u; };
         struct client v;",
        r#"
[rename.types]
"struct conn" = "struct client"
[rename.fields]
"struct conn.old_name" = "new_name"
"struct conn.in" = "in.data"
"struct conn.in_len" = "in.len"
"struct conn.lim.soft" = "soft"
[values]
"struct client.timeout_ms" = "old.timeout * 1000"
[defaults]
"struct client.quota" = 1000
[unions."struct conn.u"]
by = "old.kind"
cases = { STR = "str", NUM = "num" }
"#,
    );
    let c = p.convert();
    assert!(c.is_ok(), "{c:?}");
    let v = |f: &str| p.get(&c, f);
    assert_eq!(
        (v("timeout_ms"), v("new_name"), v("quota"), v("soft"), v("lim.hard")),
        (30_000, 5, 1000, 1, 2)
    );
    assert_eq!((v("in.data"), v("in.len"), v("kind"), v("u.num")), (0x99, 3, 1, 77));
    assert!(c.dropped.is_empty(), "{:?}", c.dropped);
    assert!(c.native.is_empty(), "{:?}", c.native);

    let without = pair(
        "struct v { int kind; union { char *s; long n; } u; } v;",
        "struct v { int kind; union { int n; double d; char *s; } u; } v;",
        "",
    );
    let c = without.convert();
    assert_eq!(c.problems[0].code, "union-changed");
    assert!(c.problems[0].next_step.contains("[unions.\"struct v.u\"]"), "{:?}", c.problems[0]);
}

#[test]
fn anonymous_members_are_seen_through() {
    let p = pair(
        "struct v { int a; struct { int b; struct { int c; }; }; union { int i; float f; }; int z; } v = { 1, { 2, { 3 } }, { 4 }, 5 };",
        "struct v { struct { int c; int a; }; int b; long extra; union { int i; float f; }; long z; } v;",
        "",
    );
    let c = p.convert();
    assert!(c.is_ok(), "{c:?}");
    let v = |f: &str| p.get(&c, f);
    assert_eq!((v("a"), v("b"), v("c"), v("i"), v("z")), (1, 2, 3, 4, 5));
    assert!(c.dropped.is_empty() && c.native.len() == 1, "{c:?}");
}

#[test]
fn typedefs_statics_and_recursion() {
    let p = pair(
        "typedef struct { int x; } thing; typedef struct node { struct node *next; thing t; struct other *o; } node;
         static int f(void) { static int hits; return ++hits; } static int cnt; node v; pthread_mutex_t m; int (*fp)(void) = f; int *pc = &cnt;",
        "typedef struct thing { int x; } thing; typedef struct node { struct node *next; thing t; struct other *o; int more; } node;
         static int f(void) { static long hits; return ++hits; } static int renamed_cnt; node v; pthread_mutex_t m; int (*fp)(void) = f; int *pc = &renamed_cnt;",
        "[rename.globals]\ncnt = \"renamed_cnt\"",
    );
    let d = p.diff();
    let (o, n) = p.types();
    assert!(!d.same_layout(o, n));
    let thing = p.old.resolve(p.old.find_type("thing").unwrap());
    assert_eq!(d.pair(thing), p.new.find_type("struct thing"), "a tag was given to it");
    let g = |name: &str| d.pair_global(p.old.global(name).unwrap()).map(|v| v.display());
    assert_eq!(
        (g("cnt"), g("hits"), g("m")),
        (Some("renamed_cnt".into()), Some("f::hits".into()), Some("m".into()))
    );
    let f = p.old.functions_named("f").next().unwrap();
    assert!(d.pair_function(f).is_some());
    assert!(d.same_layout(p.old.global("m").unwrap().ty, p.new.global("m").unwrap().ty));
    let slots = p.old.pointer_map(p.old.global("m").unwrap().ty).unwrap();
    assert!(matches!(slots[..], [mcr_transform::types::Slot { kind: SlotKind::Sync(_, 40), .. }]));
}

#[test]
fn the_report_says_everything() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/kv");
    let w = Workshop::new();
    let kv = |v: &str| {
        let text = std::fs::read_to_string(dir.join(format!("{v}.c"))).unwrap();
        load(&w.build(v, &[(&format!("{v}.c"), &text)], &["-g", "-O2"]))
    };
    let (v1, v2, v3) = (kv("v1"), kv("v2"), kv("v3"));
    let rules = Rules::default();
    let r = LayoutDiff::new(&v1, &v2, &rules).report();
    let names: Vec<&str> = r.types.iter().map(|t| t.name.as_str()).collect();
    assert_eq!(names, ["struct entry", "struct logger", "struct poller", "struct session"]);
    assert!(
        r.added_globals.iter().any(|g| g.name == "errors")
            && r.removed_globals.iter().any(|g| g.name == "total_requests")
    );
    assert!(r.added_functions.iter().any(|f| f == "cmd_errors"));
    assert!(r.needs_rule.is_empty() && !r.is_same());
    let text = r.text();
    for part in
        ["struct session (104 -> 120 bytes)", "uint64_t bytes_in is new", "int became long", "total_requests"]
    {
        assert!(text.contains(part), "{part}\n{text}");
    }

    // The last change of the bundled server: a renumbered enum comes first, the split struct needs its rules.
    let rules = Rules::load(&dir.join("v3.toml")).unwrap();
    let d = LayoutDiff::new(&v2, &v3, &rules);
    let r = d.report();
    assert!(r.types[0].silent && r.types[0].name == "enum mode", "{}", r.text());
    let session = r.types.iter().find(|t| t.name == "struct session").unwrap();
    assert!(
        session.changes.iter().any(|c| c.kind == ChangeKind::Renamed && c.text.contains("in.data")),
        "{}",
        r.text()
    );
    assert!(r.needs_rule.is_empty(), "{}", r.text());
    let (o, n) = (v2.find_type("struct session").unwrap(), v3.find_type("struct session").unwrap());
    let c = d.convert(o, n, &vec![0; v2.size_of(o) as usize]);
    assert!(c.problems.iter().all(|p| !p.refusal), "{:?}", c.problems);
    assert_eq!(c.dropped.iter().map(|d| d.path.as_str()).collect::<Vec<_>>(), ["load"]);
    let plain = Rules::default();
    assert!(
        !LayoutDiff::new(&v2, &v3, &plain).report().needs_rule.is_empty(),
        "char *in became struct inbuf in"
    );

    let same = LayoutDiff::new(&v1, &v1, &plain).report();
    assert!(same.is_same() && same.text().contains("No type and no variable differs"), "{}", same.text());
    assert!(same.compared.types > 50);
    serde_json_roundtrip(&same);
}

fn serde_json_roundtrip(r: &mcr_transform::types::TypesReport) {
    let v = serde_json::to_value(r).unwrap();
    assert!(v["compared"]["types"].as_u64().unwrap() > 0 && v["types"].as_array().unwrap().is_empty());
}

#[test]
fn globals_by_rule_and_rules_about_nothing() {
    let p = pair(
        "int v = -3; int gone; struct s { int timeout; struct { int soft; } lim; } s; static int f(void) { return gone; } int (*fp)(void) = f;",
        "long v; unsigned char tiny; struct s { int timeout_ms; struct { int soft; } lim; } s; static int f(void) { return tiny; } int (*fp)(void) = f;",
        r#"
[rename.globals]
gone = "tinny"
[rename.fields]
"struct s.timeut" = "x"
"struct s.lim.soft" = "lim.soft"
[rename.types]
"struct nope" = "struct s"
[values]
v = "old * 1000"
"struct s.timeout_ms" = "old.timeout * 1000"
[defaults]
tiny = 200
[keep]
nothing = "new"
"#,
    );
    let d = p.diff();
    let (o, n) = (p.old.global("v").unwrap(), p.new.global("v").unwrap());
    assert!(d.has_global_rule(n));
    let c = d.convert_global(o, n, &p.bytes);
    assert_eq!((i64::from_le_bytes(c.bytes.try_into().unwrap()), c.problems.len()), (-3000, 0));
    assert_eq!(d.default_global(p.new.global("tiny").unwrap()).unwrap().bytes, [200]);
    let said: Vec<String> = d.rule_mistakes().into_iter().map(|m| m.message).collect();
    assert_eq!(said.len(), 4, "{said:#?}");
    for (i, parts) in [
        &["line 3", "new version", "global `tinny`", "`tiny`"][..],
        &["line 5", "member `timeut` in `struct s`", "`timeout`"],
        &["line 8", "type `struct nope`"],
        &["line 15", "`nothing`"],
    ]
    .iter()
    .enumerate()
    {
        assert!(parts.iter().all(|p| said[i].contains(p)), "{:?} {}", parts, said[i]);
    }
}
