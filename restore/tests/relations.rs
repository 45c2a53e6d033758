//! I10 and I11 broken on purpose, over the write lists of real rehearsals: every kind of spoilt word is refused, the
//! server goes on, and a table counts what is caught.
#![allow(missing_docs)]

mod support;

use mcr_image::{Addr, Memory, Regs};
use mcr_restore::link::overlay::Overlay;
use mcr_restore::link::relations::Depth;
use mcr_restore::link::{KernelCall, LinkInput, MemWrite, Refusal, WriteList, relations};
use mcr_restore::transaction::{UpdateError, UpdateOptions, update};
use mcr_transform::Prepared;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Mutex;
use support::{Client, Server, build_source, example};

fn refusal(e: UpdateError) -> Refusal {
    match e {
        UpdateError::Link(r) => r,
        e => panic!("{e}"),
    }
}

fn rules(version: &str) -> UpdateOptions {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("../examples/kv/{version}.toml"));
    let mut o = UpdateOptions::default();
    o.transform.rules = mcr_plugin::Rules::load(&file).expect("rules");
    o
}

fn kv() -> (Server, Vec<Client>) {
    let server = Server::start(&example("v1"), &["PORT", "LOG"]);
    let mut clients: Vec<Client> = (0..4).map(|_| server.connect()).collect();
    for (i, c) in clients.iter_mut().enumerate() {
        for k in 0..60 {
            assert!(c.ask(&format!("SET key{i}.{k} value{k}")).starts_with("OK"));
        }
        c.ask("WORK 7");
        c.ask(&format!("NAME client{i}"));
    }
    (server, clients)
}

/// The word at an address, as the list leaves it.
fn now(input: &LinkInput<'_>, list: &WriteList, at: u64) -> u64 {
    let mut view = Overlay::new(input.host);
    list.memory.iter().for_each(|w| view.write(w.addr, &w.bytes));
    view.u64(Addr(at)).unwrap()
}

fn put(input: &LinkInput<'_>, list: &mut WriteList, at: u64, word: u64) {
    let mut view = Overlay::new(input.host);
    list.memory.iter().for_each(|w| view.write(w.addr, &w.bytes));
    view.write_u64(Addr(at), word);
    list.memory = view.into_writes();
}

/// Words of `struct pthread` where two workers of the new version have different objects of old's.
fn own_words(input: &LinkInput<'_>, list: &WriteList) -> Vec<(u64, u64)> {
    let t = &input.booted.threads;
    let object = |w: u64| input.old_heap.is_some_and(|h| h.find(Addr(w)).is_some_and(|c| c.state.in_use()));
    let mut view = Overlay::new(input.host);
    list.memory.iter().for_each(|w| view.write(w.addr, &w.bytes));
    (0x18..0x700)
        .step_by(8)
        .map(|off| (t[1].fs_base.0 + off, t[2].fs_base.0 + off))
        .filter(|(a, b)| {
            let (p, q) = (view.u64(Addr(*a)).unwrap_or(0), view.u64(Addr(*b)).unwrap_or(0));
            p != q && object(p) && object(q)
        })
        .collect()
}

fn exchange_loggers(input: &LinkInput<'_>, list: &mut WriteList, _: &Prepared<'_>) {
    let words = own_words(input, list);
    assert!(!words.is_empty(), "two workers have loggers of their own");
    for (a, b) in words {
        let (p, q) = (now(input, list, a), now(input, list, b));
        put(input, list, a, q);
        put(input, list, b, p);
    }
}

/// FACTS section 2: a client sees nothing of it, and every worker writes into another one's logger.
#[test]
fn i10_two_workers_exchanged_loggers_are_refused() {
    let program = build_source("race.c", "a", &[]);
    let other = build_source("race.c", "b", &["-DOTHER"]);
    for new_pid in [false, true] {
        let server = Server::start(&program, &["PORT"]);
        assert_eq!(server.connect().ask("CHECK"), "1:ok 1:ok 1:ok 1:ok", "before");
        let o = UpdateOptions { new_pid, examine: Some(exchange_loggers), ..UpdateOptions::default() };
        let r = refusal(update(server.pid(), &other, &o).map(|r| r.pid).unwrap_err());
        assert_eq!(r.invariant, "I10", "{r}");
        assert!(r.message.contains("which is thread") && r.path.contains("struct pthread"), "{r}");
        assert!(!r.next_step.is_empty());
        assert_eq!(server.connect().ask("CHECK"), "2:ok 2:ok 2:ok 2:ok", "the old server is unharmed");
        let o = UpdateOptions { dry_run: true, ..UpdateOptions::default() };
        update(server.pid(), &other, &o).unwrap_or_else(|e| panic!("unspoilt: {e}"));
    }
}

/// The thread-specific data of two equal threads: values that have an odd sequence number in front of them.
fn exchange_specific_data(input: &LinkInput<'_>, list: &mut WriteList, _: &Prepared<'_>) {
    let equal = |t: &&mcr_restore::link::NewThread| t.signature.iter().any(|f| f.contains("poller_main"));
    let two: Vec<u64> = input.booted.threads.iter().filter(equal).map(|t| t.fs_base.0).take(2).collect();
    assert_eq!(two.len(), 2, "there are equal threads");
    let value = |off: &u64| {
        let [(i, p), (j, q)] =
            [two[0], two[1]].map(|t| (now(input, list, t + off - 8), now(input, list, t + off)));
        i == j && i & 1 == 1 && i < 1 << 32 && p != q && p > 4096 && q > 4096
    };
    let values: Vec<u64> = (0x18..0x700).step_by(8).filter(value).collect();
    assert_eq!(values.len(), 1, "each has one value: {values:x?}");
    let (a, b) = (two[0] + values[0], two[1] + values[0]);
    let (p, q) = (now(input, list, a), now(input, list, b));
    put(input, list, a, q);
    put(input, list, b, p);
}

/// The same with the bundled server, whose loggers move because they grow.
#[test]
fn i10_exchanged_specific_data_of_moved_objects_is_refused() {
    let server = Server::start(&example("v1"), &["PORT", "LOG", "4"]);
    let mut clients: Vec<Client> = (0..8).map(|_| server.connect()).collect();
    assert!(clients.iter_mut().all(|c| c.ask("SELFCHECK").starts_with("OK")), "before");
    let o = UpdateOptions { examine: Some(exchange_specific_data), ..rules("v2") };
    let r = refusal(update(server.pid(), &example("v2"), &o).map(|r| r.pid).unwrap_err());
    assert_eq!(r.invariant, "I10", "{r}");
    assert!(r.message.contains("which is thread") && r.path.contains("struct pthread"), "{r}");
    assert!(clients.iter_mut().all(|c| c.ask("SELFCHECK").starts_with("OK")), "the old server is unharmed");
    let o = UpdateOptions { dry_run: true, ..rules("v2") };
    update(server.pid(), &example("v2"), &o).unwrap_or_else(|e| panic!("unspoilt: {e}"));
}

/// Objects that only the stacks of two equal workers name.
fn exchange_stacks(input: &LinkInput<'_>, list: &mut WriteList, prepared: &Prepared<'_>) {
    let heap = input.old_heap.unwrap();
    let mut view = Overlay::new(input.host);
    list.memory.iter().for_each(|w| view.write(w.addr, &w.bytes));
    // Each worker's own notes are blocks of this size.
    let note = |w: u64| heap.find(Addr(w)).is_some_and(|c| c.state.in_use() && c.usable == 328);
    let held: Vec<Vec<(u64, u64)>> = input.booted.threads[1..=2]
        .iter()
        .map(|t| {
            let end = t.fs_base.0;
            let words = (t.regs.rsp & !7..end).step_by(8);
            words.filter_map(|a| view.u64(Addr(a)).ok().filter(|w| note(*w)).map(|w| (a, w))).collect()
        })
        .collect();
    assert!(held.iter().all(|h| !h.is_empty()), "the workers hold their notes on their stacks: {held:?}");
    let (x, y) = (held[0][0].1, held[1][0].1);
    for (a, w) in held.concat() {
        let other = if w & !0xf == x & !0xf { w - x + y } else { w - y + x };
        put(input, list, a, other);
    }
    for r in &mut list.registers {
        let words: Vec<u64> = r
            .regs
            .to_words()
            .into_iter()
            .map(|w| {
                if w == x {
                    y
                } else if w == y {
                    x
                } else {
                    w
                }
            })
            .collect();
        r.regs = Regs::from_words(&words).unwrap();
    }
    // The locals' names say it, too; what only unnamed words say is looked at here.
    let e = relations::check(input, list, prepared, Depth::All).unwrap_err();
    assert!(e.invariant == "I10" || e.invariant == "I11", "{e}");
    SEEN.lock().unwrap().push(e.to_string());
}
static SEEN: Mutex<Vec<String>> = Mutex::new(Vec::new());

#[test]
fn i10_two_workers_exchanged_stacks_are_refused() {
    let program = build_source("race.c", "notes-a", &["-DNOTES"]);
    let other = build_source("race.c", "notes-b", &["-DNOTES", "-DOTHER"]);
    let server = Server::start(&program, &["PORT"]);
    assert_eq!(server.connect().ask("CHECK"), "1:ok 1:ok 1:ok 1:ok", "before");
    let o = UpdateOptions { examine: Some(exchange_stacks), ..UpdateOptions::default() };
    let r = refusal(update(server.pid(), &other, &o).map(|r| r.pid).unwrap_err());
    assert!(r.invariant == "I10" || r.invariant == "I11", "{r}");
    assert_eq!(server.connect().ask("CHECK"), "2:ok 2:ok 2:ok 2:ok");
    let o = UpdateOptions::default();
    let done = update(server.pid(), &other, &o).unwrap_or_else(|e| panic!("unspoilt: {e}"));
    assert_eq!(server.connect().ask("CHECK"), "3:ok 3:ok 3:ok 3:ok");
    drop(support::Reaper(done.pid));
}

/// Where a word of the list lies.
fn class(input: &LinkInput<'_>, at: u64) -> &'static str {
    let (patch, booted) = (input.patch, input.booted);
    let within = |start: u64, len: u64| start <= at && at < start + len;
    if patch.regions.iter().any(|r| within(r.start, r.content.len() as u64)) {
        return "moved object";
    }
    if !booted.is_native(Addr(at)) {
        let chunk = input.old_heap.unwrap().find(Addr(at));
        return if chunk.is_some_and(|c| c.state.in_use()) { "old object in place" } else { "malloc's own" };
    }
    let tls = input.new_elf.tls().map_or(0, |t| t.exe_offset());
    for t in &booted.threads {
        if t.fs_base.0 - tls <= at && at < t.fs_base.0 {
            return "thread-local of the program";
        }
        if t.fs_base.0 - 0x200 <= at && at < t.fs_base.0 {
            return "thread-local of libc";
        }
        if within(t.fs_base.0, 0xa00) {
            return "struct pthread";
        }
        if t.stack.is_some_and(|s| s.contains(Addr(at))) {
            return "stack";
        }
    }
    match booted.modules.iter().find(|m| m.start.0 <= at && at < m.end.0) {
        Some(m) if m.is_exe => {
            let g = patch
                .globals
                .iter()
                .find(|g| within(booted.new_base.0 + g.new_link_addr, g.content.len() as u64));
            let kept = |g: &mcr_image::proto::GlobalValue| {
                let o = at - booted.new_base.0 - g.new_link_addr;
                g.keep_native.iter().any(|r| r.start <= o && o < r.end)
            };
            if g.is_some_and(|g| !kept(g)) { "carried global" } else { "native global" }
        }
        Some(_) => "libc and libraries",
        None => "start-up object",
    }
}

type Table = BTreeMap<(&'static str, &'static str), (usize, usize, usize)>;
static TABLE: Mutex<Table> = Mutex::new(Table::new());
static MISSED: Mutex<Vec<String>> = Mutex::new(Vec::new());
const EACH: usize = 30;

fn spoil(input: &LinkInput<'_>, list: &mut WriteList, prepared: &Prepared<'_>) {
    let checked =
        relations::check(input, list, prepared, Depth::All).unwrap_or_else(|e| panic!("unspoilt: {e}"));
    eprintln!("{:?}, {} words, {} bytes delivered", checked.relations, checked.words, checked.delivered);
    let mut seed = 0x9e37_79b9_7f4a_7c15u64;
    let mut random = move || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed
    };
    let try_it = |class: &'static str, kind: &'static str, bad: &WriteList, what: &dyn Fn() -> String| {
        let all = relations::check(input, bad, prepared, Depth::All).is_err();
        let roots = relations::check(input, bad, prepared, Depth::Words).is_err();
        let mut table = TABLE.lock().unwrap();
        let row = table.entry((class, kind)).or_default();
        *row = (row.0 + 1, row.1 + usize::from(all), row.2 + usize::from(roots));
        if !all {
            MISSED.lock().unwrap().push(format!("{class}, {kind}: {}", what()));
        }
    };
    // Words that the list changes, by class.
    let mut words: BTreeMap<&'static str, Vec<(u64, u64, u64)>> = BTreeMap::new();
    let mut view = Overlay::new(input.host);
    list.memory.iter().for_each(|w| view.write(w.addr, &w.bytes));
    for w in &list.memory {
        for at in ((w.addr.0 & !7)..w.addr.0 + w.bytes.len() as u64).step_by(8) {
            let (a, b) = (input.host.u64(Addr(at)).unwrap_or(0), view.u64(Addr(at)).unwrap());
            if a != b {
                words.entry(class(input, at)).or_default().push((at, a, b));
            }
        }
    }
    let object = |w: u64| {
        input.old_heap.is_some_and(|h| h.find(Addr(w)).is_some_and(|c| c.state.in_use()))
            || input.patch.regions.iter().any(|r| r.start <= w && w < r.start + r.content.len() as u64)
    };
    for (class, all) in &words {
        let pointers: Vec<_> = all.iter().copied().filter(|w| object(w.2)).collect();
        let pick = |list: &[(u64, u64, u64)], r: u64| list[r as usize % list.len()];
        let spoilt = |at: u64, value: u64| {
            let mut bad = list.clone();
            put(input, &mut bad, at, value);
            bad
        };
        for _ in 0..EACH.min(4 * all.len()) {
            let (at, was, is) = pick(all, random());
            let what = || format!("{at:#x}: {was:#x} -> {is:#x}");
            try_it(class, "write dropped", &spoilt(at, was), &what);
            // Not of an address's unused high bits alone.
            let bit = 1 << (random() % 64);
            try_it(class, "bit flipped", &spoilt(at, is ^ bit), &what);
        }
        for _ in 0..EACH.min(4 * pointers.len()) {
            let (at, was, is) = pick(&pointers, random());
            let what = || format!("{at:#x}: {was:#x} -> {is:#x}");
            try_it(class, "pointer 8 off", &spoilt(at, is + 8), &what);
            let (other, _, q) = pick(&pointers, random());
            if q != is {
                let mut bad = spoilt(at, q);
                put(input, &mut bad, other, is);
                try_it(class, "two exchanged", &bad, &what);
            }
        }
    }
    // A write that nobody asks for.
    let chunks: Vec<_> = input.old_heap.unwrap().in_use().filter(|c| c.usable >= 24).collect();
    for _ in 0..EACH {
        let c = chunks[random() as usize % chunks.len()];
        let at = c.addr.0 + random() % (c.usable / 8) * 8;
        if list.memory.iter().any(|w| w.addr.0 < at + 8 && at < w.addr.0 + w.bytes.len() as u64) {
            continue;
        }
        let mut bad = list.clone();
        let is = input.host.u64(Addr(at)).unwrap();
        put(input, &mut bad, at, is ^ 0x40);
        try_it("old object in place", "write too many", &bad, &|| format!("{at:#x}"));
    }
    for (i, call) in list.calls.iter().enumerate() {
        if let KernelCall::EpollCtl { data, .. } = call {
            let mut bad = list.clone();
            bad.calls.remove(i);
            try_it("epoll", "call dropped", &bad, &|| format!("{call:?}"));
            let mut bad = list.clone();
            if let KernelCall::EpollCtl { data: d, .. } = &mut bad.calls[i] {
                *d = data + 8;
            }
            try_it("epoll", "datum 8 off", &bad, &|| format!("{call:?}"));
            let mut bad = list.clone();
            let other = list.calls.iter().enumerate().find_map(|(j, c)| match c {
                KernelCall::EpollCtl { data: d, .. } if j != i && d != data => Some((j, *d)),
                _ => None,
            });
            if let Some((j, d)) = other {
                for (k, value) in [(i, d), (j, *data)] {
                    if let KernelCall::EpollCtl { data, .. } = &mut bad.calls[k] {
                        *data = value;
                    }
                }
                try_it("epoll", "two exchanged", &bad, &|| format!("{call:?}"));
            }
        }
    }
    for (i, r) in list.registers.iter().enumerate() {
        let Some(t) = input.booted.threads.iter().find(|t| t.tid == r.tid) else { continue };
        let (then, now) = (t.regs.to_words(), r.regs.to_words());
        for n in (0..then.len()).filter(|&n| then[n] != now[n]) {
            for (kind, value) in [("write dropped", then[n]), ("pointer 8 off", now[n] + 8)] {
                let mut words = now.clone();
                words[n] = value;
                let mut bad = list.clone();
                bad.registers[i] =
                    mcr_restore::link::RegWrite { tid: r.tid, regs: Regs::from_words(&words).unwrap() };
                try_it("register", kind, &bad, &|| format!("thread {}, word {n}: {:#x}", r.tid, now[n]));
            }
        }
    }
}

fn show(name: &str) -> Table {
    let table = std::mem::take(&mut *TABLE.lock().unwrap());
    eprintln!("{name}: spoilt words refused at the rehearsal, in the pause, of all");
    for ((class, kind), (n, all, roots)) in &table {
        eprintln!("{class:>28} {kind:<16} {all:>4} {roots:>4} {n:>4}");
    }
    let mut missed = std::mem::take(&mut *MISSED.lock().unwrap());
    missed.sort();
    missed.dedup();
    for m in missed {
        eprintln!("  missed: {m}");
    }
    table
}

/// What has to be caught always.
fn complete(table: &Table, rows: &[(&str, &[&str])]) {
    for (class, kinds) in rows {
        for ((c, k), (n, all, _)) in table.iter().filter(|((c, k), _)| c == class && kinds.contains(k)) {
            assert_eq!(n, all, "{c}, {k}: some were not refused");
        }
    }
}

#[test]
fn spoilt_words_are_refused() {
    let (server, mut clients) = kv();
    let o = UpdateOptions { dry_run: true, examine: Some(spoil), ..rules("v2") };
    update(server.pid(), &example("v2"), &o).unwrap_or_else(|e| panic!("{e}"));
    let table = show("kv 1 -> 2");
    let every: &[&str] = &[
        "write dropped",
        "bit flipped",
        "pointer 8 off",
        "two exchanged",
        "write too many",
        "call dropped",
        "datum 8 off",
    ];
    complete(
        &table,
        &[
            ("moved object", every),
            ("old object in place", every),
            ("carried global", every),
            ("thread-local of the program", every),
            ("epoll", every),
            ("struct pthread", every),
            ("thread-local of libc", every),
        ],
    );
    assert!(table.len() > 12, "{table:?}");
    assert!(clients[0].ask("SELFCHECK").starts_with("OK"), "the server goes on");

    let (a, b) = (build_source("race.c", "a", &[]), build_source("race.c", "b", &["-DOTHER"]));
    let server = Server::start(&a, &["PORT"]);
    assert_eq!(server.connect().ask("CHECK"), "1:ok 1:ok 1:ok 1:ok", "before");
    let o = UpdateOptions { dry_run: true, examine: Some(spoil), ..UpdateOptions::default() };
    update(server.pid(), &b, &o).unwrap_or_else(|e| panic!("{e}"));
    let table = show("four workers");
    complete(
        &table,
        &[("struct pthread", every), ("thread-local of libc", every), ("carried global", every)],
    );
    assert!(table.contains_key(&("struct pthread", "two exchanged")), "{table:?}");
}

/// A write list that is empty is no update.
fn nothing(_: &LinkInput<'_>, list: &mut WriteList, _: &Prepared<'_>) {
    list.memory = vec![MemWrite { addr: list.memory[0].addr, bytes: list.memory[0].bytes.clone() }];
}

#[test]
fn i11_what_does_not_arrive_is_refused_by_name() {
    let (server, mut clients) = kv();
    let o = UpdateOptions { dry_run: true, examine: Some(nothing), ..rules("v2") };
    let r = refusal(update(server.pid(), &example("v2"), &o).map(|r| r.pid).unwrap_err());
    assert!(r.invariant == "I11" && !r.path.is_empty(), "{r}");
    assert!(clients[0].ask("SELFCHECK").starts_with("OK"), "the server goes on");
}
