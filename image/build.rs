//! Compiles `schema/*.proto` into Rust without needing `protoc`.
fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=schema");
    let mut files: Vec<_> =
        std::fs::read_dir("schema")?.map(|e| e.map(|e| e.path())).collect::<Result<_, _>>()?;
    files.retain(|p| p.extension().is_some_and(|e| e == "proto"));
    files.sort();
    let set = protox::compile(&files, ["schema"])?;
    prost_build::Config::new()
        .type_attribute(".", "#[derive(serde::Serialize)]")
        .enum_attribute(".", "#[serde(rename_all = \"snake_case\")]")
        .compile_fds(set)?;
    Ok(())
}
