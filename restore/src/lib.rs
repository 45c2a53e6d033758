//! From image to process: rebuild, boot, link, apply, transaction.

pub mod link;
