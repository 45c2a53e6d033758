//! `cargo run --release -p mcr-transform --example types -- OLD [NEW]`: reads the types of a program, compares
//! two, and says how long it took.

use mcr_image::elf::{DebugDirs, ElfFile};
use mcr_plugin::Rules;
use mcr_transform::types::{LayoutDiff, TypeModel};
use std::time::Instant;

fn load(path: &str) -> Result<TypeModel, Box<dyn std::error::Error>> {
    let elf = ElfFile::open(path)?;
    let debug = elf.section_data(".debug_info")?.map_or(0, |d| d.len());
    let start = Instant::now();
    let m = TypeModel::load(&elf, &DebugDirs::default())?;
    eprintln!(
        "{path}: {:.1} MB of .debug_info in {} ms: {} types, {} variables, {} functions, {} units",
        debug as f64 / 1e6,
        start.elapsed().as_millis(),
        m.len(),
        m.globals().len(),
        m.functions().len(),
        m.units().len()
    );
    Ok(m)
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let Some(old) = args.first() else { return Err("usage: types OLD [NEW]".into()) };
    let old = load(old)?;
    let Some(new) = args.get(1) else { return Ok(()) };
    let new = load(new)?;
    let rules = Rules::default();
    let start = Instant::now();
    let report = LayoutDiff::new(&old, &new, &rules).report();
    let took = start.elapsed();
    println!("{}", report.text());
    eprintln!("compared in {} ms", took.as_millis());
    Ok(())
}
