//! The keeper: connections outlive their process, and nothing is left behind.

use libtest_mimic::{Failed, Trial};
use mcr_restore::keeper::{Keeper, KeeperError, KeeperOptions, Kept};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::time::Duration;

pub fn trials() -> Vec<Trial> {
    vec![
        Trial::test("keeper_holds_a_connection", holds),
        Trial::test("keeper_serves_again_until_confirmed", again),
        Trial::test("keeper_ends_at_its_deadline", deadline),
        Trial::test("keeper_drops_everything_when_told", drops),
        Trial::test("keeper_of_an_unknown_image_is_gone", gone),
        Trial::test("keeper_holds_a_thousand", thousand),
    ]
}

fn id(what: &str) -> String {
    format!("test-{}-{what}", std::process::id())
}

fn pair() -> Result<(TcpStream, TcpStream, TcpListener), Failed> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let client = TcpStream::connect(listener.local_addr()?)?;
    let (server, _) = listener.accept()?;
    Ok((client, server, listener))
}

fn start(what: &str, files: Vec<OwnedFd>) -> Result<Keeper, Failed> {
    let kept = files.into_iter().enumerate().map(|(n, fd)| Kept { ofd: n as u32, ino: 1000 + n as u64, fd });
    Ok(Keeper::start(&id(what), kept.collect(), &KeeperOptions::default())?)
}

fn holds() -> Result<(), Failed> {
    let (mut client, server, listener) = pair()?;
    let keeper = start("holds", vec![server.into(), listener.into()])?;
    client.write_all(b"sent while nobody serves")?;
    let mut fetched = Keeper::fetch(keeper.name())?;
    assert_eq!(fetched.fds.len(), 2);
    assert_eq!(fetched.fds[&1].ino, 1001);
    let kept = fetched.fds.remove(&0).ok_or("first file")?;
    let mut server = TcpStream::from(kept.fd);
    let mut b = [0; 24];
    server.read_exact(&mut b)?;
    assert_eq!(&b, b"sent while nobody serves");
    server.write_all(b"answer")?;
    let mut b = [0; 6];
    client.read_exact(&mut b)?;
    fetched.confirm();
    keeper.abandon();
    // The connection is ours alone now: closing it reaches the client.
    drop(server);
    assert_eq!(client.read(&mut b)?, 0);
    Ok(())
}

fn again() -> Result<(), Failed> {
    let (mut client, server, _listener) = pair()?;
    let keeper = start("again", vec![server.into()])?;
    drop(Keeper::fetch(keeper.name())?);
    assert_eq!(Keeper::status(keeper.name())?.0, 1);
    let fetched = Keeper::fetch(keeper.name())?;
    fetched.confirm();
    // End-of-file at the client proves that the keeper has ended: it held the only copy.
    assert_eq!(client.read(&mut [0; 1])?, 0);
    assert!(matches!(Keeper::fetch(keeper.name()), Err(KeeperError::Gone { .. })));
    keeper.abandon();
    Ok(())
}

fn deadline() -> Result<(), Failed> {
    let (mut client, server, _listener) = pair()?;
    let kept = vec![Kept { ofd: 0, ino: 1, fd: server.into() }];
    let options = KeeperOptions { deadline: Duration::from_secs(1), ..Default::default() };
    let keeper = Keeper::start(&id("deadline"), kept, &options)?;
    assert_eq!(client.read(&mut [0; 1])?, 0);
    keeper.abandon();
    Ok(())
}

fn drops() -> Result<(), Failed> {
    let (mut client, server, _listener) = pair()?;
    let keeper = start("drops", vec![server.into()])?;
    Keeper::drop_all(keeper.name())?;
    assert_eq!(client.read(&mut [0; 1])?, 0);
    keeper.abandon();
    Ok(())
}

fn gone() -> Result<(), Failed> {
    let e = Keeper::fetch("mcr-keeper-never-started").err().ok_or("no error")?;
    assert!(e.to_string().contains("--drop-connections"), "{e}");
    Ok(())
}

fn thousand() -> Result<(), Failed> {
    let mut files = Vec::new();
    for _ in 0..1000 {
        files.push(OwnedFd::from(std::fs::File::open("/dev/null")?));
    }
    let keeper = start("thousand", files)?;
    let fetched = Keeper::fetch(keeper.name())?;
    assert_eq!(fetched.fds.len(), 1000);
    fetched.confirm();
    keeper.abandon();
    Ok(())
}
