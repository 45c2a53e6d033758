//! An image whose connections can come back without the keeper: on another machine, or in another network
//! namespace.
//!
//! The record is taken **after the dumped process has ended**, from the keeper's copies of its sockets. Repair
//! mode and a filter that drops everything are dangerous to a server: if the engine died in between, the
//! server would go on with a mute connection. So no socket that a living server uses is ever touched, and there
//! is no moment at which a killed engine could harm one:
//!
//! 1. `dump` refuses what cannot be recorded ([`check`]), writes the whole image, and ends the process; the
//!    keeper holds its sockets. From here on the image can be restored on this machine, whatever happens.
//! 2. [`export`] holds every socket still ([`crate::tcp_repair::hold`]), takes the records and writes the image
//!    again with them, under the same name when it is complete.
//! 3. The sockets stay with the keeper, held and in repair mode: a restore on this machine lets them go on; when
//!    the keeper ends in any way they vanish without a FIN or RST.
//!
//! An [`export`] that fails or is killed leaves the image of step 1; a restore lets sockets go on that it finds
//! held. Without an export the keeper's end is an ordinary close: peers see the end of their connection.

use crate::keeper::{Keeper, KeeperError};
use crate::tcp_repair::{self, CLOSE, CLOSE_WAIT, ESTABLISHED, Held, LISTEN, RepairError, name_of_state};
use mcr_image::{Image, ImageError, proto};
use proto::fd::Object;
use std::collections::BTreeSet;
use std::os::fd::AsFd;
use std::path::Path;

/// Why an image did not become portable. It is as it was, and its keeper holds its connections.
#[derive(Debug, thiserror::Error)]
pub enum PortableError {
    /// The keeper.
    #[error(transparent)]
    Keeper(#[from] KeeperError),
    /// The image.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// One connection.
    #[error("fd {number} ({link}): {source}; it can be restored on this machine through the keeper")]
    Connection {
        /// Its number.
        number: u32,
        /// What it is.
        link: String,
        /// Why.
        source: RepairError,
    },
    /// Not about one connection.
    #[error(transparent)]
    Repair(RepairError),
    /// What [`check`] found.
    #[error(
        "fd {number} ({link}): a TCP connection in state {state} is not carried to another machine; wait until \
         it is closed, or dump without --tcp-repair"
    )]
    State {
        /// Its number.
        number: u32,
        /// What it is.
        link: String,
        /// Its state.
        state: &'static str,
    },
}

/// What [`export`] did.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Exported {
    /// Connections recorded.
    pub connections: u32,
    /// Bytes in their queues.
    pub queued_bytes: u64,
    /// Connections that a listener had not handed out yet: they end when the keeper does.
    pub not_accepted: u32,
    /// Length of the image.
    pub image_bytes: u64,
}

/// Refuses, while nothing has been touched, what [`export`] could not record.
pub fn check(process: &proto::Process) -> Result<(), PortableError> {
    for fd in &process.fds {
        let Some(Object::Tcp(t)) = &fd.object else { continue };
        // The peer's FIN is sent again as a raw segment, which is done for IPv4 only.
        let ended = t.state == CLOSE_WAIT && !tcp_repair::is_ipv4(t);
        if ended || !matches!(t.state, ESTABLISHED | CLOSE_WAIT | CLOSE | LISTEN) {
            let state = name_of_state(t.state);
            return Err(PortableError::State { number: fd.number, link: fd.link.clone(), state });
        }
    }
    Ok(())
}

/// Takes the record of every connection that the keeper of the image `path` holds, and writes it into the
/// image. The process of the image must have ended.
pub fn export(path: &Path) -> Result<Exported, PortableError> {
    let image = Image::open(path)?;
    let mut process = image.process().clone();
    let mut done = Exported::default();
    if image.meta().keeper_socket.is_empty() {
        return Ok(done);
    }
    let fetched = Keeper::fetch(&image.meta().keeper_socket)?;
    let mut held = Held::default();
    let sockets = |fds: &[proto::Fd]| -> Vec<usize> {
        let mut seen = BTreeSet::new();
        let tcp =
            |f: &proto::Fd| matches!(f.object, Some(Object::Tcp(_))) && fetched.fds.contains_key(&f.ofd);
        (0..fds.len()).filter(|i| tcp(&fds[*i]) && seen.insert(fds[*i].ofd)).collect()
    };
    let all = sockets(&process.fds);
    for &i in &all {
        let fd = &process.fds[i];
        let Some(Object::Tcp(t)) = &fd.object else { continue };
        let failed = |source| PortableError::Connection { number: fd.number, link: fd.link.clone(), source };
        let copy = fetched.fds[&fd.ofd].fd.try_clone();
        let copy = copy.map_err(|source| failed(RepairError::Call { call: "dup", source }))?;
        held.add(copy, tcp_repair::reuse_of(t)).map_err(failed)?;
    }
    tcp_repair::settle().map_err(PortableError::Repair)?;
    for &i in &all {
        let fd = &mut process.fds[i];
        let sock = fetched.fds[&fd.ofd].fd.as_fd();
        let (number, link) = (fd.number, fd.link.clone());
        let Some(Object::Tcp(t)) = &mut fd.object else { continue };
        let recorded = record(t, sock, &mut done);
        recorded.map_err(|source| PortableError::Connection { number, link, source })?;
    }
    // Descriptors that share an open file say the same.
    let shared: Vec<(u32, Object)> =
        all.iter().filter_map(|&i| Some((process.fds[i].ofd, process.fds[i].object.clone()?))).collect();
    for (ofd, object) in shared {
        process.fds.iter_mut().filter(|f| f.ofd == ofd).for_each(|f| f.object = Some(object.clone()));
    }
    done.image_bytes = image.write_process(path, &process)?.file_bytes;
    held.keep();
    Ok(done)
}

fn record(
    t: &mut proto::TcpSocket,
    sock: std::os::fd::BorrowedFd<'_>,
    done: &mut Exported,
) -> Result<(), RepairError> {
    // The peer may have ended it since the dump.
    match tcp_repair::state(sock)? {
        LISTEN => done.not_accepted += tcp_repair::not_accepted(sock)?,
        CLOSE => {
            t.state = CLOSE;
            t.peer.clear();
        }
        state => {
            if state == CLOSE_WAIT && !tcp_repair::is_ipv4(t) {
                let why = "its peer has ended it, which is carried for IPv4 only".to_owned();
                return Err(RepairError::Unsupported(why));
            }
            let r = tcp_repair::record(sock)?;
            t.state = state;
            done.connections += 1;
            done.queued_bytes += (r.send_queue.len() + r.recv_queue.len()) as u64;
            t.repair = Some(r);
        }
    }
    Ok(())
}
