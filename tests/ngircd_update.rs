//! ngIRCd, unprepared, between two adjacent releases: what an operator cannot restart without throwing everybody out.

use crate::support::servers::{Build, Load, builds, under_load};
use crate::support::{Check, Server, expect_mcr, free_port, reported_pid, scratch};
use crate::{Case, ensure};
use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

/// Members of the channel.
const MEMBERS: usize = 20;

pub fn cases(list: bool) -> Vec<Case> {
    // Listing the tests builds nothing.
    let reason = if list { None } else { builds::<2>("ngircd").err() };
    vec![
        Case::new("ngircd: to the next release and back, in place, while people talk", in_place)
            .skip_if(reason.clone()),
        Case::new("ngircd: to the next release through an image", through_an_image).skip_if(reason),
    ]
}

/// Somebody on IRC.
struct User {
    name: String,
    stream: BufReader<TcpStream>,
}

impl User {
    fn register(port: u16, name: &str) -> Result<Self, String> {
        let s = TcpStream::connect(("127.0.0.1", port)).map_err(|e| format!("connect: {e}"))?;
        s.set_read_timeout(Some(Duration::from_secs(30))).map_err(|e| e.to_string())?;
        s.set_nodelay(true).map_err(|e| e.to_string())?;
        let mut u = Self { name: name.to_owned(), stream: BufReader::new(s) };
        u.tell(&format!("NICK {name}\r\nUSER {name} 0 * :the real {name}\r\n"))?;
        // RPL_ENDOFMOTD, ERR_NOMOTD.
        u.hears(|l| [" 376 ", " 422 "].iter().any(|n| l.contains(n)))?;
        Ok(u)
    }

    fn tell(&mut self, what: &str) -> Check {
        self.stream.get_mut().write_all(what.as_bytes()).map_err(|e| format!("{}: {e}", self.name))
    }

    fn line(&mut self) -> Result<String, String> {
        loop {
            let mut s = String::new();
            let n = self.stream.read_line(&mut s).map_err(|e| format!("{}: {e}", self.name))?;
            ensure!(n > 0, "{} was disconnected", self.name);
            match s.strip_prefix("PING ") {
                Some(token) => self.tell(&format!("PONG {token}"))?,
                None => return Ok(s.trim_end().to_owned()),
            }
        }
    }

    fn hears(&mut self, wanted: impl Fn(&str) -> bool) -> Result<String, String> {
        loop {
            let l = self.line()?;
            if wanted(&l) {
                return Ok(l);
            }
        }
    }

    /// Sends a command and waits for its numeric reply.
    fn asks(&mut self, command: &str, numeric: &str) -> Result<String, String> {
        self.tell(&format!("{command}\r\n"))?;
        self.hears(|l| l.split(' ').nth(1) == Some(numeric))
    }

    /// The next thing that is said in the channel must be this.
    fn reads(&mut self, from: &str, text: &str) -> Check {
        let l = self.hears(|l| l.contains(" PRIVMSG #hall "))?;
        ensure!(
            l.starts_with(&format!(":{from}!")) && l.ends_with(&format!(" PRIVMSG #hall :{text}")),
            "{}: {l:?} instead of {text:?} from {from}",
            self.name
        );
        Ok(())
    }
}

/// The server drops root by itself, and has to reach what it is given.
fn allow(path: &Path) -> Check {
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755))
        .map_err(|e| format!("chmod {}: {e}", path.display()))
}

/// A copy of a release where the server's user can open it.
fn installed((version, program): &Build, dir: &Path) -> Result<String, String> {
    let to = dir.join(format!("ngircd-{version}"));
    if !to.exists() {
        std::fs::copy(program, &to).map_err(|e| format!("{}: {e}", to.display()))?;
        allow(&to)?;
    }
    Ok(to.display().to_string())
}

/// A server with a channel that has members, modes and a topic.
struct Hall {
    server: Server,
    port: u16,
    members: Vec<User>,
    dir: tempfile::TempDir,
}

impl Hall {
    fn open(older: &Build) -> Result<Self, String> {
        let (dir, port) = (scratch(), free_port());
        let config = dir.path().join("ngircd.conf");
        let text = format!(
            "[Global]\nName = irc.example.net\nInfo = test\nListen = 127.0.0.1\nPorts = {port}\nMotdPhrase = hello\n\
             [Limits]\nMaxConnectionsIP = 0\nPingTimeout = 600\n[Options]\nDNS = no\nPAM = no\n"
        );
        std::fs::write(&config, text).map_err(|e| e.to_string())?;
        allow(dir.path())?;
        allow(&config)?;
        let program = installed(older, dir.path())?;
        let server = Server::start(Command::new(&program).args(["-n", "-f"]).arg(&config), None);
        server.listens(port)?;
        let mut members: Vec<User> =
            (0..MEMBERS).map(|i| User::register(port, &format!("nick{i}"))).collect::<Result<_, _>>()?;
        for u in &mut members {
            u.asks("JOIN #hall", "366")?;
        }
        members[0].tell("TOPIC #hall :as before\r\n")?;
        for u in &mut members {
            u.hears(|l| l.contains(" TOPIC #hall :as before"))?;
        }
        members[0].tell("MODE #hall +v nick3\r\nMODE #hall +k secret\r\n")?;
        for u in &mut members {
            u.hears(|l| l.contains(" MODE #hall +k secret"))?;
        }
        Ok(Self { server, port, members, dir })
    }

    /// Everything that was, and what can be done with it. `n`: which time this is.
    fn check(&mut self, version: &str, n: usize) -> Check {
        let said = self.members[1].asks("VERSION", "351")?;
        ensure!(said.contains(&format!(" ngIRCd-{version}. ")), "VERSION: {said}, not {version}");
        let topic = self.members[2].asks("TOPIC #hall", "332")?;
        ensure!(topic.ends_with(":as before"), "{topic}");
        let names = self.members[3].asks("NAMES #hall", "353")?;
        let names: Vec<&str> = names.rsplit(':').next().unwrap_or_default().split(' ').collect();
        ensure!(names.len() == MEMBERS, "{} members: {names:?}", names.len());
        ensure!(names.contains(&"@nick0") && names.contains(&"+nick3"), "{names:?}");
        for i in [4, 11] {
            let who = self.members[i].asks("WHOIS nick7", "311")?;
            ensure!(who.ends_with(":the real nick7"), "{who}");
        }
        // Somebody new does not get in without the key, and with it everybody sees it come and go.
        let mut guest = User::register(self.port, &format!("guest{n}"))?;
        guest.asks("JOIN #hall", "475")?;
        guest.asks("JOIN #hall secret", "366")?;
        guest.tell("QUIT :gone\r\n")?;
        for u in &mut self.members {
            u.hears(|l| l.starts_with(&format!(":guest{n}!")) && l.contains(" JOIN "))?;
            u.hears(|l| l.starts_with(&format!(":guest{n}!")) && l.contains(" QUIT "))?;
        }
        Ok(())
    }

    /// One speaks, all others hear it, once and in order.
    fn says(&mut self, who: usize, text: &str) -> Check {
        self.members[who].tell(&format!("PRIVMSG #hall :{text}\r\n"))?;
        self.heard(who, text)
    }

    fn heard(&mut self, who: usize, text: &str) -> Check {
        let from = format!("nick{who}");
        for (i, u) in self.members.iter_mut().enumerate() {
            if i != who {
                u.reads(&from, text)?;
            }
        }
        Ok(())
    }
}

/// Two of them talk, without end; each line must arrive. The longest way in µs: the server itself makes those wait
/// for a second that say more than ten lines in one.
fn talk(port: u16, pair: usize, load: &Load) -> Result<u64, String> {
    let (a, b) = (format!("alice{pair}"), format!("bob{pair}"));
    let (mut alice, mut bob) = (User::register(port, &a)?, User::register(port, &b)?);
    let (mut n, mut longest) = (0u64, 0u64);
    while load.goes_on() {
        let start = Instant::now();
        n += 1;
        alice.tell(&format!("PRIVMSG {b} :line {n}\r\n"))?;
        let l = bob.line()?;
        ensure!(l.starts_with(&format!(":{a}!")) && l.ends_with(&format!(":line {n}")), "line {n}: {l:?}");
        longest = longest.max(start.elapsed().as_micros() as u64);
        load.got(1);
    }
    Ok(longest)
}

fn in_place() -> Check {
    let [older, newer] = builds("ngircd")?;
    let mut hall = Hall::open(&older)?;
    hall.check(&older.0, 0)?;
    let programs = [installed(&newer, hall.dir.path())?, installed(&older, hall.dir.path())?];
    let port = hall.port;
    under_load(
        4,
        |pair, load| talk(port, pair, load),
        |load| {
            for round in 0..3 {
                let (version, program) = ([&newer.0, &older.0][round % 2], &programs[round % 2]);
                hall.says(round, &format!("before {round}"))?;
                hall.members[5].tell("PRIVMSG #ha")?;
                load.more(8)?;
                let pid = hall.server.pid;
                let args = ["update", &pid.to_string(), "--to", program, "--json"];
                ensure!(reported_pid(&expect_mcr(0, &args)?)? == pid, "another pid");
                hall.members[5].tell("ll :half a line\r\n")?;
                hall.heard(5, "half a line")?;
                hall.says(round + 6, &format!("after {round}"))?;
                hall.check(version, round + 1)?;
            }
            Ok(())
        },
    )?;
    // A kick, an operator who hands over, and everybody leaves.
    hall.members[0].tell("MODE #hall +o nick1\r\nKICK #hall nick2 :out\r\n")?;
    for u in &mut hall.members {
        u.hears(|l| l.contains(" KICK #hall nick2 :out"))?;
    }
    let mut last = hall.members.pop().ok_or("no member")?;
    for u in &mut hall.members {
        u.tell("QUIT :bye\r\n")?;
        u.hears(|l| l.starts_with("ERROR "))?;
    }
    let names = last.asks("NAMES #hall", "353")?;
    ensure!(names.ends_with(&format!(":{}", last.name)), "{names}");
    Ok(())
}

fn through_an_image() -> Check {
    let [older, newer] = builds("ngircd")?;
    let mut hall = Hall::open(&older)?;
    hall.check(&older.0, 0)?;
    hall.members[5].tell("PRIVMSG #ha")?;
    let dir = scratch();
    let path = |n: &str| dir.path().join(n).display().to_string();
    let (before, after, to) = (path("before.mcr"), path("after.mcr"), installed(&newer, hall.dir.path())?);
    expect_mcr(0, &["dump", &hall.server.pid.to_string(), "-o", &before])?;
    hall.server.reap();
    expect_mcr(0, &["transform", &before, "--to", &to, "-o", &after])?;
    let pid = reported_pid(&expect_mcr(0, &["restore", &after, "--json"])?)?;
    ensure!(pid == hall.server.pid, "another pid");
    hall.members[5].tell("ll :half a line\r\n")?;
    hall.heard(5, "half a line")?;
    hall.says(6, "after")?;
    hall.check(&newer.0, 1)
}
