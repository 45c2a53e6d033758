//! `mcr`: live update and checkpoint/restore for running Linux servers.
fn main() {}
