//! The container and the memory view: round trips, updates, and what is refused.

use mcr_image::proto::{EmbeddedFile, Meta, Patch, Process, Vma, VmaKind};
use mcr_image::{
    Addr, Image, ImageError, ImageWriter, Memory, MemoryError, PAGE, RecordKind, Stored, WriterOptions,
};
use std::io::Write;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::sync::{Arc, Mutex};

const BASE: u64 = 0x7f00_0000_0000;

fn vma(start: u64, pages: u64, kind: VmaKind) -> Vma {
    Vma { start, end: start + pages * PAGE as u64, prot: 3, kind: kind as i32, ..Default::default() }
}

/// Text, noise and zero pages in turn.
fn content(pages: usize) -> Vec<u8> {
    let mut seed = 1u64;
    let mut v = Vec::new();
    for n in 0..pages {
        for i in 0..PAGE {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            v.push(match n % 3 {
                0 => b'a' + (i % 16) as u8,
                1 => (seed >> 56) as u8,
                _ => 0,
            });
        }
    }
    v
}

fn write_to(out: &Path, options: WriterOptions, process: &Process, f: impl FnOnce(&mut ImageWriter)) {
    let mut w = ImageWriter::create_with(out, options).unwrap();
    w.put(RecordKind::Meta, &Meta { mcr_version: "test".into(), ..Default::default() }).unwrap();
    f(&mut w);
    w.put(RecordKind::Process, process).unwrap();
    w.finish().unwrap();
}

#[test]
fn round_trip_over_levels_threads_and_frame_sizes() {
    let dir = tempfile::tempdir().unwrap();
    let data = content(200);
    let process =
        Process { pid: 7, vmas: vec![vma(BASE, 300, VmaKind::VmaAnonPrivate)], ..Default::default() };
    for (level, threads, frame_size) in [(0, 1, PAGE), (1, 1, 256 << 10), (1, 4, 64 << 10), (3, 2, 1 << 20)] {
        let path = dir.path().join("x.mcr");
        let options = WriterOptions { level, threads, frame_size, sync: false };
        write_to(&path, options, &process, |w| w.pages(Addr(BASE), &data).unwrap());
        let image = Image::open(&path).unwrap();
        image.verify().unwrap();
        assert_eq!(image.meta().mcr_version, "test");
        assert_eq!(image.process(), &process);
        let m = image.memory();
        assert_eq!(m.bytes(Addr(BASE), data.len()).unwrap(), data);
        // Unaligned, across frames; then the untouched tail.
        assert_eq!(m.bytes(Addr(BASE + 100), 300_000).unwrap(), data[100..300_100]);
        assert_eq!(m.bytes(Addr(BASE + 299 * PAGE as u64), PAGE).unwrap(), [0; PAGE]);
        for bad in [BASE - 1, BASE + 300 * PAGE as u64 - 1, u64::MAX] {
            assert!(matches!(m.bytes(Addr(bad), 2), Err(MemoryError::Unmapped { .. })));
        }
        // A scan sees every non-zero byte once.
        let mut seen = vec![0; data.len()];
        m.for_each_run(Addr(BASE), Addr(u64::MAX), &mut |a, b| {
            let at = (a.0 - BASE) as usize;
            assert!(seen[at..at + b.len()].iter().all(|x| *x == 0));
            seen[at..at + b.len()].copy_from_slice(b);
        })
        .unwrap();
        assert!(seen == data);
    }
}

#[test]
fn frames_are_shared_between_threads_and_evicted() {
    let data = content(300);
    let process =
        Process { pid: 7, vmas: vec![vma(BASE, 300, VmaKind::VmaAnonPrivate)], ..Default::default() };
    let image = in_memory(&process, |w| w.pages(Addr(BASE), &data).unwrap());
    image.set_cache_limit(600 << 10);
    let m = image.memory();
    std::thread::scope(|s| {
        for t in 0..4usize {
            let (m, data) = (m.clone(), &data);
            s.spawn(move || {
                for n in 0..400 {
                    let at = (n * 7919 + t * 104_729) * 8 % (data.len() - 64);
                    assert_eq!(m.bytes(Addr(BASE + at as u64), 64).unwrap(), data[at..at + 64]);
                }
            });
        }
    });
}

#[derive(Clone, Default)]
struct Sink(Arc<Mutex<Vec<u8>>>);
impl Write for Sink {
    fn write(&mut self, b: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(b);
        Ok(b.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

fn bytes_of(process: &Process, f: impl FnOnce(&mut ImageWriter)) -> Vec<u8> {
    let sink = Sink::default();
    let mut w = ImageWriter::to_writer(Box::new(sink.clone()), WriterOptions::default()).unwrap();
    w.put(RecordKind::Meta, &Meta::default()).unwrap();
    w.put(RecordKind::Process, process).unwrap();
    f(&mut w);
    w.finish().unwrap();
    std::mem::take(&mut *sink.0.lock().unwrap())
}

fn in_memory(process: &Process, f: impl FnOnce(&mut ImageWriter)) -> Image {
    Image::from_bytes(bytes_of(process, f)).unwrap()
}

#[test]
fn private_pages_come_from_the_embedded_file_or_from_disk() {
    let dir = tempfile::tempdir().unwrap();
    let (lib, disk) = (content(5), dir.path().join("data"));
    let on_disk: Vec<u8> = content(4)[..3 * PAGE + 100].to_vec();
    std::fs::write(&disk, &on_disk).unwrap();
    let meta = std::fs::metadata(&disk).unwrap();
    let at = |n: u64| BASE + n * PAGE as u64;
    let process = Process {
        pid: 1,
        vmas: vec![
            Vma {
                file_offset: PAGE as u64,
                module_key: "k1".into(),
                ..vma(at(0), 4, VmaKind::VmaFilePrivate)
            },
            Vma {
                name: disk.to_str().unwrap().into(),
                ino: meta.ino(),
                dev: meta.dev(),
                file_size: meta.len(),
                file_mtime_ns: meta.mtime() * 1_000_000_000 + meta.mtime_nsec(),
                ..vma(at(10), 4, VmaKind::VmaFilePrivate)
            },
            Vma { prot: 0, ..vma(at(14), 1, VmaKind::VmaAnonPrivate) },
        ],
        ..Default::default()
    };
    let changed = content(1);
    let image = in_memory(&process, |w| {
        let file = EmbeddedFile { key: "k1".into(), path: "/lib/x.so".into(), ..Default::default() };
        w.file(&file, &lib).unwrap();
        w.file(&file, b"the same key is stored once").unwrap();
        w.pages(Addr(at(1)), &changed).unwrap();
        w.pages(Addr(at(2)), &[0; PAGE]).unwrap(); // zeroed by the program: the file must not show
    });
    let m = image.memory();
    assert_eq!(image.file("k1").unwrap().unwrap(), lib);
    assert_eq!(image.file("other").unwrap(), None);
    assert_eq!(
        image.files().map(|f| (f.path.as_str(), f.size)).collect::<Vec<_>>(),
        [("/lib/x.so", lib.len() as u64)]
    );
    assert_eq!(m.bytes(Addr(at(0)), PAGE).unwrap(), lib[PAGE..2 * PAGE]);
    assert_eq!(m.bytes(Addr(at(1)), PAGE).unwrap(), changed);
    assert_eq!(m.bytes(Addr(at(2)), PAGE).unwrap(), [0; PAGE]);
    assert_eq!(m.bytes(Addr(at(3)), PAGE).unwrap(), lib[4 * PAGE..]);
    let mut expected = on_disk.clone();
    expected.resize(4 * PAGE, 0);
    assert_eq!(m.bytes(Addr(at(10)), 4 * PAGE).unwrap(), expected);
    assert!(m.bytes(Addr(at(14)), 1).is_err());
    assert_eq!(m.regions().len(), 2);
    let mut stored = Vec::new();
    m.for_each_stored(Addr(0), Addr(u64::MAX), &mut |a, s| {
        stored.push((a.0, matches!(s, Stored::Zero(n) if n == PAGE as u64)));
    })
    .unwrap();
    assert_eq!(stored, [(at(1), false), (at(2), true)]);
    let mut scanned = 0;
    m.for_each_run(Addr(0), Addr(u64::MAX), &mut |_, b| scanned += b.len()).unwrap();
    assert_eq!(scanned, (1 + 1 + 1 + 4) * PAGE);
    // Another file under the same name is not taken for the mapped one.
    std::fs::write(&disk, b"something else").unwrap();
    let fresh = image.memory();
    let e = fresh.bytes(Addr(at(10)), 8).unwrap_err().to_string();
    assert!(e.contains("is not the file that was mapped"), "{e}");
}

#[test]
fn an_update_keeps_every_record_and_replaces_the_patch() {
    let dir = tempfile::tempdir().unwrap();
    let process =
        Process { pid: 7, vmas: vec![vma(BASE, 90, VmaKind::VmaAnonPrivate)], ..Default::default() };
    let data = content(90);
    let dump = in_memory(&process, |w| {
        w.pages(Addr(BASE), &data).unwrap();
        w.file(&EmbeddedFile { key: "old".into(), ..Default::default() }, &data[..9000]).unwrap();
    });
    assert!(!dump.has_patch() && dump.patch().unwrap().is_none());
    let (first, second) = (dir.path().join("1"), dir.path().join("2"));
    dump.write_update(&first, &Patch { new_path: "one".into(), ..Default::default() }).unwrap();
    let one = Image::open(&first).unwrap();
    let new = EmbeddedFile { key: "new".into(), ..Default::default() };
    one.write_update_with(&second, &Patch { new_path: "two".into(), ..Default::default() }, &[(new, b"ELF")])
        .unwrap();
    let two = Image::open(&second).unwrap();
    for i in [&one, &two] {
        i.verify().unwrap();
        assert_eq!(i.memory().bytes(Addr(BASE), data.len()).unwrap(), data);
        assert_eq!(i.file("old").unwrap().unwrap(), &data[..9000]);
    }
    assert_eq!(one.patch().unwrap().unwrap().new_path, "one");
    assert_eq!(two.patch().unwrap().unwrap().new_path, "two");
    assert_eq!(two.file("new").unwrap().unwrap(), b"ELF");
}

#[test]
fn the_file_appears_whole_or_not_at_all() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.mcr");
    std::fs::write(&path, b"before").unwrap();
    let mut w = ImageWriter::create(&path).unwrap();
    w.pages(Addr(BASE), &content(100)).unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), b"before");
    drop(w);
    assert_eq!(std::fs::read(&path).unwrap(), b"before");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    write_to(&path, WriterOptions::default(), &Process::default(), |_| ());
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    let e = ImageWriter::create(&dir.path().join("no/such/dir")).err().unwrap().to_string();
    assert!(e.contains("no/such"), "{e}");
    assert!(ImageWriter::create(dir.path()).is_err());
    // No space left.
    let mut w = ImageWriter::create(Path::new("/dev/full")).map_err(|e| e.to_string());
    if let Ok(w) = w.as_mut() {
        let _ = w.pages(Addr(BASE), &content(300));
    }
    let e = match w {
        Ok(w) => w.finish().unwrap_err().to_string(),
        Err(e) => e,
    };
    assert!(e.contains("/dev/full") && e.contains("no space is left"), "{e}");
}

#[test]
fn the_writer_refuses_what_an_image_cannot_hold() {
    let mut w = ImageWriter::to_writer(Box::new(std::io::sink()), WriterOptions::default()).unwrap();
    assert!(w.pages(Addr(BASE + 1), &[1; PAGE]).is_err());
    assert!(w.pages(Addr(BASE), &[1; 100]).is_err());
    assert!(w.file(&EmbeddedFile::default(), b"x").is_err());
    let options = WriterOptions { frame_size: 1000, ..Default::default() };
    assert!(ImageWriter::to_writer(Box::new(std::io::sink()), options).is_err());
}

#[test]
fn bad_files_are_refused_by_name() {
    let process = Process { pid: 7, vmas: vec![vma(BASE, 9, VmaKind::VmaAnonPrivate)], ..Default::default() };
    let good = bytes_of(&process, |w| w.pages(Addr(BASE), &content(9)).unwrap());
    let text = |b: &[u8]| Image::from_bytes(b).err().unwrap().to_string();
    assert!(text(b"").contains("empty"));
    assert!(text(b"\x7fELF").contains("not an mcr image"));
    assert!(text(&good[..20]).contains("truncated"));
    let e = Image::from_bytes(&good[..good.len() / 2]).unwrap_err();
    assert!(
        matches!(&e, ImageError::Truncated { record, offset, .. } if record.contains("pages") && *offset > 32),
        "{e}"
    );
    assert!(text(&good[..good.len() - 1]).contains("the trailer"));
    let mut longer = good.clone();
    longer.push(0);
    assert!(text(&longer).contains("bytes follow"), "{}", text(&longer));
    let mut other = good.clone();
    other[8] = 9;
    let crc = crc32fast::hash(&other[..28]).to_le_bytes();
    other[28..32].copy_from_slice(&crc);
    assert!(text(&other).contains("image format 9.0"), "{}", text(&other));
    other.copy_from_slice(&good);
    other[12] = 183;
    let crc = crc32fast::hash(&other[..28]).to_le_bytes();
    other[28..32].copy_from_slice(&crc);
    assert!(text(&other).contains("machine 183"));
    // A flipped bit in a page: the image opens, the read names record and offset.
    let mut flipped = good.clone();
    let at = good.windows(8).position(|w| w == &content(2)[PAGE..PAGE + 8]).unwrap_or(good.len() / 2);
    flipped[at] ^= 1;
    let image = Image::from_bytes(flipped).unwrap();
    let e = image.memory().bytes(Addr(BASE), 9 * PAGE).unwrap_err().to_string();
    assert!(e.contains("pages record at offset 0x") && e.contains("checksum"), "{e}");
    assert!(image.verify().is_err());
    // No process, no meta.
    let sink = Sink::default();
    let w = ImageWriter::to_writer(Box::new(sink.clone()), WriterOptions::default()).unwrap();
    w.finish().unwrap();
    let empty = sink.0.lock().unwrap().clone();
    assert!(text(&empty).contains("no meta record"));
}

/// A message of a later version, with a field that this one does not know.
#[derive(Clone, PartialEq, prost::Message)]
struct FutureMeta {
    #[prost(string, tag = "1")]
    mcr_version: String,
    #[prost(string, tag = "9999")]
    extra: String,
}

#[test]
fn what_a_later_version_added_survives_an_update() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = (dir.path().join("a"), dir.path().join("b"));
    let mut w = ImageWriter::create_with(&a, WriterOptions { level: 0, ..Default::default() }).unwrap();
    let future = FutureMeta { mcr_version: "9".into(), extra: "field from the future".into() };
    w.put(RecordKind::Meta, &future).unwrap();
    w.put(RecordKind::Process, &Process::default()).unwrap();
    let record = EmbeddedFile { path: "record from the future".into(), ..Default::default() };
    w.put(RecordKind::Patch, &record).unwrap();
    w.finish().unwrap();
    // Make the third record one of a kind that does not exist yet: in its head and in the index.
    let mut bytes = std::fs::read(&a).unwrap();
    let heads: Vec<usize> = (0..bytes.len()).filter(|i| bytes[*i..].starts_with(b"MREC")).collect();
    let (third, index, end) = (heads[2], heads[3], bytes.len() - 40);
    bytes[third + 4] = 77;
    let at = index + bytes[index..].windows(3).position(|w| w == [0x10, 3, 0x18]).unwrap();
    bytes[at + 1] = 77;
    let seal = |b: &mut [u8], from: usize, len: usize| {
        let crc = crc32fast::hash(&b[from..from + len]).to_le_bytes();
        b[from + len..from + len + 4].copy_from_slice(&crc);
    };
    seal(&mut bytes, third, 36);
    let body = bytes[index + 16..index + 24].try_into().map(u64::from_le_bytes).unwrap() as usize;
    let crc = crc32fast::hash(&bytes[index + 40..index + 40 + body]).to_le_bytes();
    bytes[index + 32..index + 36].copy_from_slice(&crc);
    seal(&mut bytes, index, 36);
    let digest = crc32fast::hash(&bytes[..end]).to_le_bytes();
    bytes[end + 24..end + 28].copy_from_slice(&digest);
    seal(&mut bytes, end, 36);

    let image = Image::from_bytes(bytes).unwrap();
    image.verify().unwrap();
    assert_eq!(image.meta().mcr_version, "9");
    assert!(!image.has_patch());
    image.write_update(&b, &Patch::default()).unwrap();
    let updated = std::fs::read(&b).unwrap();
    Image::from_bytes(updated.clone()).unwrap().verify().unwrap();
    for text in ["field from the future", "record from the future"] {
        assert!(updated.windows(text.len()).any(|w| w == text.as_bytes()), "{text} is lost");
    }
}

/// `cargo test --release -p mcr-image --test container speed -- --ignored --nocapture`
#[test]
#[ignore = "prints figures"]
fn speed() {
    let data: Vec<u8> = content(3 << 10).repeat(16); // 192 MiB
    let gib = data.len() as f64 / f64::from(1 << 30);
    let pages = (data.len() / PAGE) as u64;
    let process =
        Process { pid: 7, vmas: vec![vma(BASE, pages, VmaKind::VmaAnonPrivate)], ..Default::default() };
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x");
    for (level, threads) in [(0, 1), (1, 1), (1, 2), (3, 2)] {
        let t = std::time::Instant::now();
        let options = WriterOptions { level, threads, sync: false, ..Default::default() };
        write_to(&path, options, &process, |w| w.pages(Addr(BASE), &data).unwrap());
        let write = gib / t.elapsed().as_secs_f64();
        let image = Image::open(&path).unwrap();
        let mut rates = Vec::new();
        for _ in 0..2 {
            let t = std::time::Instant::now();
            let mut n = 0;
            image.memory().for_each_run(Addr(0), Addr(u64::MAX), &mut |_, b| n += b.len()).unwrap();
            rates.push(gib / t.elapsed().as_secs_f64());
        }
        let t = std::time::Instant::now();
        let m = image.memory();
        for i in 0..1_000_000u64 {
            m.u64(Addr(BASE + i * 7_919 * 64 % (pages * PAGE as u64 - 8))).unwrap();
        }
        println!(
            "level {level}, {threads} threads: write {write:.2} GiB/s, scan {:.2} then {:.2} GiB/s, \
             1M words {:.0} ms, file {} MiB of {}",
            rates[0],
            rates[1],
            t.elapsed().as_secs_f64() * 1000.0,
            image.len() >> 20,
            data.len() >> 20
        );
    }
}
