//! Damaged and hostile files: an error or the same content, never a panic, never unbounded memory.

use mcr_image::proto::{EmbeddedFile, Meta, Patch, Process, Thread, Vma, VmaKind};
use mcr_image::{Addr, Image, ImageError, ImageWriter, Memory, PAGE, RecordKind, WriterOptions, export_core};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::test_runner::TestRunner;
use std::cell::Cell;
use std::sync::OnceLock;

const BASE: u64 = 0x5555_0000_0000;

/// A small image with every kind of record, compressed and not.
fn good(compressed: bool) -> &'static [u8] {
    static GOOD: [OnceLock<Vec<u8>>; 2] = [OnceLock::new(), OnceLock::new()];
    GOOD[usize::from(compressed)].get_or_init(|| {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("a");
        let vma = |n: u64, pages: u64, kind: VmaKind| Vma {
            start: BASE + n * PAGE as u64,
            end: BASE + (n + pages) * PAGE as u64,
            prot: 3,
            kind: kind as i32,
            module_key: "lib".into(),
            ..Default::default()
        };
        let process = Process {
            pid: 1,
            vmas: vec![vma(0, 8, VmaKind::VmaAnonPrivate), vma(8, 2, VmaKind::VmaFilePrivate)],
            threads: vec![Thread { tid: 1, regs: vec![7; 27], ..Default::default() }],
            ..Default::default()
        };
        let text: Vec<u8> = (0..3 * PAGE).map(|i| (i % 7) as u8).collect();
        let level = i32::from(compressed);
        let mut w = ImageWriter::create_with(&out, WriterOptions { level, ..Default::default() }).unwrap();
        w.put(RecordKind::Meta, &Meta { hostname: "h".into(), ..Default::default() }).unwrap();
        w.put(RecordKind::Process, &process).unwrap();
        w.file(&EmbeddedFile { key: "lib".into(), ..Default::default() }, &text[..500]).unwrap();
        w.put(RecordKind::Patch, &Patch { new_path: "/new".into(), ..Default::default() }).unwrap();
        w.pages(Addr(BASE), &text[..if compressed { 3 } else { 1 } * PAGE]).unwrap();
        w.pages(Addr(BASE + 5 * PAGE as u64), &[0; PAGE]).unwrap();
        w.finish().unwrap();
        std::fs::read(out).unwrap()
    })
}

/// Everything there is to read, in a form to compare.
fn exercise(image: &Image) -> Result<Vec<u8>, String> {
    let mut out = format!("{:?}{:?}", image.meta(), image.processes()).into_bytes();
    let e = |e: &dyn std::fmt::Display| e.to_string();
    out.extend(format!("{:?}", image.patch().map_err(|x| e(&x))?).into_bytes());
    let m = image.memory();
    for r in m.regions() {
        let len = r.end.since(r.start);
        out.extend(m.bytes(r.start, len.min(1 << 20) as usize).map_err(|x| e(&x))?);
        m.bytes(Addr(r.end.0 - 1), 1).map_err(|x| e(&x))?;
    }
    let mut sum = 0;
    m.for_each_run(Addr(0), Addr(u64::MAX), &mut |_, b| sum += b.len()).map_err(|x| e(&x))?;
    m.for_each_stored(Addr(0), Addr(u64::MAX), &mut |_, _| sum += 1).map_err(|x| e(&x))?;
    out.extend(sum.to_le_bytes());
    for f in image.files() {
        out.extend(image.file(&f.key).map_err(|x| e(&x))?.unwrap_or_default());
    }
    Ok(out)
}

/// Makes the checksums right again, so that what lies behind them is reached.
fn reseal(b: &mut [u8]) {
    let le = |b: &[u8], at: usize| u64::from_le_bytes(b[at..at + 8].try_into().unwrap()) as usize;
    let put = |b: &mut [u8], at: usize, v: u32| b[at..at + 4].copy_from_slice(&v.to_le_bytes());
    let Some(end) = b.len().checked_sub(40) else {
        return;
    };
    let mut at = 32;
    while at + 40 <= end && b[at..].starts_with(b"MREC") {
        let desc = u32::from_le_bytes(b[at + 12..at + 16].try_into().unwrap()) as usize;
        let len = desc.saturating_add(le(b, at + 16));
        if let Some(body) =
            len.checked_add(40).and_then(|l| at.checked_add(l)).and_then(|e| b.get(at + 40..e))
        {
            let crc = crc32fast::hash(body);
            put(b, at + 32, crc);
        }
        let crc = crc32fast::hash(&b[at..at + 36]);
        put(b, at + 36, crc);
        let Some(next) = len.checked_add(47).and_then(|l| at.checked_add(l)) else {
            break;
        };
        at = next & !7;
    }
    let digest = crc32fast::hash(&b[..end]);
    put(b, end + 24, digest);
    let len = (b.len() as u64).to_le_bytes();
    b[end + 16..end + 24].copy_from_slice(&len);
    let crc = crc32fast::hash(&b[end..end + 36]);
    put(b, end + 36, crc);
}

#[derive(Clone, Debug)]
enum Mutation {
    Flip(usize, u8),
    Set(usize, u8),
    Insert(usize, Vec<u8>),
    Remove(usize, usize),
    Truncate(usize),
    Word(usize, u64),
}

fn mutation() -> impl Strategy<Value = Mutation> {
    let at = || 0usize..8192;
    prop_oneof![
        (at(), 0u8..8).prop_map(|(a, b)| Mutation::Flip(a, b)),
        (at(), any::<u8>()).prop_map(|(a, b)| Mutation::Set(a, b)),
        (at(), vec(any::<u8>(), 1..64)).prop_map(|(a, b)| Mutation::Insert(a, b)),
        (at(), 1usize..64).prop_map(|(a, b)| Mutation::Remove(a, b)),
        at().prop_map(Mutation::Truncate),
        (at(), prop_oneof![Just(u64::MAX), Just(1 << 63), Just(1 << 31), Just(0), any::<u64>()])
            .prop_map(|(a, b)| Mutation::Word(a, b)),
    ]
}

fn apply(b: &mut Vec<u8>, m: &Mutation) {
    let len = b.len().max(1);
    match m {
        _ if b.is_empty() => {}
        Mutation::Flip(at, bit) => b[at % len] ^= 1 << bit,
        Mutation::Set(at, v) => b[at % len] = *v,
        Mutation::Insert(at, v) => drop(b.splice(at % len..at % len, v.iter().copied())),
        Mutation::Remove(at, n) => drop(b.drain(at % len..(at % len + n).min(len))),
        Mutation::Truncate(at) => b.truncate(at % len),
        Mutation::Word(at, v) => {
            let at = at % len;
            let n = (len - at).min(8);
            b[at..at + n].copy_from_slice(&v.to_le_bytes()[..n]);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 10_000, failure_persistence: None, ..ProptestConfig::default() })]

    /// Plain damage: noticed, or without effect.
    #[test]
    fn damage_is_noticed(compressed: bool, mutations in vec(mutation(), 1..4)) {
        let mut b = good(compressed).to_vec();
        for m in &mutations {
            apply(&mut b, m);
        }
        if let Ok(image) = Image::from_bytes(b.clone()) {
            let read = exercise(&image);
            if b == good(compressed) || image.verify().is_ok() {
                prop_assert_eq!(read, exercise(&Image::from_bytes(good(compressed)).unwrap()));
            } else if let Ok(read) = read {
                prop_assert_eq!(read, exercise(&Image::from_bytes(good(compressed)).unwrap()).unwrap());
            }
        }
    }
}

/// Malice: right checksums over wrong content. Only "no panic, bounded" can be asked.
#[test]
fn malice_is_survived() {
    let (tried, opened) = (Cell::new(0), Cell::new(0));
    let mut runner = TestRunner::new(ProptestConfig {
        cases: 10_000,
        failure_persistence: None,
        ..ProptestConfig::default()
    });
    let result = runner.run(&(any::<bool>(), vec(mutation(), 1..6)), |(compressed, mutations)| {
        let mut b = good(compressed).to_vec();
        for m in &mutations {
            apply(&mut b, m);
            reseal(&mut b);
        }
        tried.set(tried.get() + 1);
        if let Ok(image) = Image::from_bytes(b) {
            opened.set(opened.get() + 1);
            let _ = exercise(&image);
            let _ = image.verify();
            if image.memory().regions().iter().all(|r| r.end.since(r.start) < 1 << 20) {
                let _ = export_core(&image, &mut std::io::sink());
            }
        }
        Ok(())
    });
    result.unwrap();
    // Otherwise nothing but the index would be tested.
    assert!(opened.get() * 20 > tried.get(), "{} of {} opened", opened.get(), tried.get());
}

#[test]
fn resealing_alone_changes_nothing() {
    let mut b = good(true).to_vec();
    reseal(&mut b);
    assert!(b == good(true));
    assert!(exercise(&Image::from_bytes(b).unwrap()).is_ok());
}

#[test]
fn every_truncation_is_an_error_with_an_offset() {
    for n in 0..good(true).len() {
        let e = Image::from_bytes(&good(true)[..n]).unwrap_err();
        assert!(matches!(e, ImageError::Truncated { .. } | ImageError::Corrupt { .. }) || n == 0, "{n}: {e}");
    }
}

#[test]
fn a_frame_that_claims_too_much_is_refused() {
    // The stored size of the first record's content stays, the claimed size becomes 3 GiB.
    let mut b = good(true).to_vec();
    b[32 + 24..32 + 32].copy_from_slice(&(3u64 << 30).to_le_bytes());
    reseal(&mut b);
    assert!(Image::from_bytes(b).is_err());
}
