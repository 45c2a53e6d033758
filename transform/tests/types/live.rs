//! Locals, expressions and printed values of a running program.

use crate::procs::Target;
use crate::support::{Workshop, load};
use mcr_image::{Addr, Memory, unwind};
use mcr_transform::types::expr::{Bases, ExprError, evaluate};
use mcr_transform::types::print::{Limits, Printer};
use mcr_transform::types::{LocalPlace, TypeModel};
use std::collections::HashMap;

const PROGRAM: &str = r#"
#include <stdio.h>
#include <string.h>
#include <unistd.h>
enum mode { PLAIN, LOUD = 4 };
struct conn { struct conn *next; const char *name; int fd; enum mode mode; unsigned flag : 1, level : 5; double load;
              void (*run)(struct conn *); char in[16]; int nums[4]; union { int i; float f; } u; struct { int inner; }; };
static void handler(struct conn *c) { c->fd++; }
static struct conn second = { 0, "second \"q\"\n", 8, PLAIN, 0, 3, -0.5, handler, "", {1, 2, 3, 4} };
static struct conn first = { &second, "first", 7, LOUD, 1, 17, 2.25, handler, "buf", {9, 9, 9, 9}, { 5 }, { 77 } };
struct conn *head = &first;
static struct { int port; struct conn **all; } config;
struct conn *table[3] = { &first, 0, &second };
static int stat(void) { static int hits = 41; return ++hits; }
__attribute__((noinline)) static int wait_here(struct conn *c, long depth)
{
    char buf[32]; long local = depth * 3; struct { int a, b; } pair = { (int)depth, 9 };
    strcpy(buf, "on the stack");
    { long inner = local + 1;
      printf("c=%p depth=%ld local=%ld inner=%ld a=%d b=%d buf=%p\n", (void *)c, depth, local, inner, pair.a, pair.b, (void *)buf);
      fflush(stdout);
      pause();
      local += inner; }
    return (int)(local + pair.a * pair.b + buf[depth % 3] + c->fd);
}
__attribute__((noinline)) int outer(int n)
{
    struct conn *mine = head->next; long doubled = n * 2L;
    int r = wait_here(head, n + 5);
    return r + mine->fd + (int)doubled;
}
int main(void) { config.port = 6379; stat(); config.all = table; return outer(getpid() > 0 ? 10 : 11); }
"#;

fn parse(line: &str) -> HashMap<String, u64> {
    line.split_whitespace()
        .map(|kv| {
            let (k, v) = kv.split_once('=').unwrap();
            let n = v
                .strip_prefix("0x")
                .map_or_else(|| v.parse().unwrap(), |h| u64::from_str_radix(h, 16).unwrap());
            (k.to_owned(), n)
        })
        .collect()
}

fn word(b: &[u8]) -> u64 {
    b.iter().rev().fold(0, |n, b| n << 8 | u64::from(*b))
}

#[test]
fn locals_of_stopped_frames() {
    let w = Workshop::new();
    for (i, flags) in [
        &["-g", "-O0", "-gdwarf-5"][..],
        &["-g", "-O0", "-gdwarf-4"],
        &["-g", "-O0", "-fomit-frame-pointer"],
        &["-g", "-O2", "-gdwarf-5"],
        &["-g", "-O2", "-gdwarf-4"],
    ]
    .iter()
    .enumerate()
    {
        let p = w.build(&format!("live{i}"), &[("live.c", PROGRAM)], flags);
        let m = load(&p);
        let mut t = Target::start(&p, &[]);
        t.attach();
        let said = parse(&t.line);
        let (modules, memory) = (t.modules(), t.memory());
        let bias = modules.exe().unwrap().bias;
        let frames = unwind(&modules, &memory, &t.regs(t.pid())).frames;
        let frame =
            |name: &str| frames.iter().find(|f| m.function_of(f).is_some_and(|f| &*f.name == name)).unwrap();
        let here = m.locals_at(frame("wait_here"), &memory, bias);
        let local =
            |n: &str| here.iter().find(|l| l.name == n).unwrap_or_else(|| panic!("{n} {flags:?} {here:?}"));
        for n in ["c", "depth", "local", "inner"] {
            let l = local(n);
            match l.bytes(&m, &memory) {
                Some(b) => assert_eq!(word(&b), said[n], "{n} {flags:?} {l:?}"),
                // Optimised code may have nothing to say, but it may not say something wrong.
                None => assert!(flags.contains(&"-O2"), "{n} {flags:?} {l:?}"),
            }
        }
        if let Some(b) = local("pair").bytes(&m, &memory) {
            assert_eq!((word(&b[..4]), word(&b[4..])), (said["a"], said["b"]), "{flags:?}");
        }
        assert_eq!(local("buf").place, LocalPlace::Memory(Addr(said["buf"])), "{flags:?}");
        assert!(local("c").parameter && !local("local").parameter);
        assert_eq!(m.display(local("c").ty), "struct conn *");

        // The caller's variables live in callee-saved registers when optimised: saved in the frame below.
        let up = m.locals_at(frame("outer"), &memory, bias);
        let mine = up.iter().find(|l| l.name == "mine").unwrap();
        let value = mine.bytes(&m, &memory).map(|b| word(&b));
        let second = m.global("second").unwrap().place.link().unwrap().at(bias).0;
        match value {
            Some(v) => assert_eq!(v, second, "{flags:?} {mine:?}"),
            None => assert!(flags.contains(&"-O2"), "{flags:?} {mine:?}"),
        }
        if let LocalPlace::Register { saved_at: Some(at), value, .. } = mine.place {
            assert_eq!(memory.u64(at).unwrap(), value);
        }
    }
}

struct Stopped {
    t: Target,
    m: TypeModel,
    bias: Addr,
}

impl Stopped {
    fn show(&self, e: &str) -> String {
        let memory = self.t.memory();
        let modules = self.t.modules();
        let symbol = |a: Addr| {
            let module = modules.find(a)?;
            let f = module.elf.function_at(module.link(a))?;
            Some(f.name.to_owned())
        };
        let printer = Printer { model: &self.m, memory: &memory, symbol: &symbol, limits: Limits::default() };
        match self.eval(e) {
            Ok(v) => printer.text(&v),
            Err(e) => format!("error: {e}"),
        }
    }
    fn eval(&self, e: &str) -> Result<mcr_transform::types::expr::Value, ExprError> {
        evaluate(&self.m, &self.t.memory(), Bases { bias: self.bias, tls: None }, e)
    }
    fn json(&self, e: &str) -> serde_json::Value {
        let memory = self.t.memory();
        let printer =
            Printer { model: &self.m, memory: &memory, symbol: &|_| None, limits: Limits::default() };
        printer.json(&self.eval(e).unwrap())
    }
}

#[test]
fn expressions_print_like_a_debugger() {
    let w = Workshop::new();
    let p = w.build("shown", &[("live.c", PROGRAM)], &["-g"]);
    let m = load(&p);
    let mut t = Target::start(&p, &[]);
    t.attach();
    let bias = t.modules().exe().unwrap().bias;
    let s = Stopped { t, m, bias };
    assert_eq!(s.show("config.port"), "6379");
    assert_eq!(s.show("head->fd"), "7");
    assert_eq!(s.show("head->next->fd"), "8");
    assert_eq!(s.show("head->mode"), "LOUD");
    assert_eq!(s.show("head->level"), "17");
    assert_eq!(s.show("table[2]->load"), "-0.5");
    assert_eq!(s.show("(*head).nums[3]"), "9");
    assert_eq!(s.show("stat::hits"), "42");
    assert_eq!(s.show("live.c::config.port"), "6379");
    assert_eq!(s.show("head->inner"), "77");
    assert!(s.show("head->in").contains("\"buf\""), "{}", s.show("head->in"));
    assert!(s.show("head->next->name").contains(r#""second \"q\"\n""#), "{}", s.show("head->next->name"));
    assert!(s.show("head->run").contains("handler"), "{}", s.show("head->run"));
    let all = s.show("*head");
    for part in ["next = 0x", "fd = 7", "mode = LOUD", "load = 2.25", "{9, 9, 9, 9}", "level = 17"] {
        assert!(all.contains(part), "{part}\n{all}");
    }
    assert_eq!(s.json("*head")["fd"], 7, "{}", s.json("*head"));
    for (e, part) in [
        ("nothing", "nothing"),
        ("head->nofield", "nofield"),
        ("table[1]->fd", "NULL"),
        ("head..fd", "column"),
        ("config.port->x", "int"),
    ] {
        let said = s.show(e);
        assert!(said.starts_with("error: ") && said.contains(part), "{e}: {said}");
    }
}
