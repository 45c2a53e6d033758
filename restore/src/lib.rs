//! From image to process: rebuild, boot, link, apply, transaction.

pub mod apply;
pub mod boot;
pub mod fds;
pub mod inplace;
pub mod keeper;
pub mod link;
pub mod portable;
pub mod rebuild;
mod signals;
mod sys;
pub mod tcp_repair;
pub mod transaction;
pub mod trial;
