use super::*;

const ALL: &str = r#"
[rename.types]
"struct conn" = "struct client"
[rename.fields]
"struct conn.timeout" = "timeout_ms"
[rename.globals]
nconns = "nclients"
[rename.functions]
on_read = "client_read"
[values]
"struct client.timeout_ms" = "old.timeout * 1000"
nclients = "old + 1"
[defaults]
"struct client.quota" = 1000
verbose = true
[keep]
command_table = "new"
[types]
"dictEntry.v.val" = "struct robj"
cookie = "opaque"
[unions."struct value.u"]
by = "old.kind"
cases = { KIND_STR = "str", 2 = "num" }
default = "raw"
[[quiescent]]
stack = ["epoll_wait", "event_loop"]
safe_when = "server.loading == 0"
[boot]
argv = ["./kv", "--port", "6000"]
env = { KV_DEBUG = "1" }
unset_env = ["OLD_FLAG"]
timeout_s = 20
[fds]
leave = [7]
leave_paths = ["/var/log/kv*"]
"#;

fn parse(text: &str) -> Result<Rules, RulesError> {
    Rules::parse(text, Path::new("r.toml"))
}

#[test]
fn every_section_is_read() {
    let r = parse(ALL).unwrap();
    assert_eq!(r.new_type("struct conn"), "struct client");
    assert_eq!(r.new_type("conn"), "struct client");
    assert_eq!(r.new_type("union conn"), "union conn");
    assert_eq!(r.old_type("struct client"), "struct conn");
    assert_eq!(r.new_field("struct conn", "timeout"), "timeout_ms");
    assert_eq!(r.old_field("struct conn", "timeout_ms"), "timeout");
    assert_eq!(r.old_field("struct other", "timeout_ms"), "timeout_ms");
    assert_eq!((r.new_global("nconns"), r.old_global("nclients")), ("nclients", "nconns"));
    assert_eq!((r.new_function("on_read"), r.old_function("main")), ("client_read", "main"));
    let v = r.value("struct client", "timeout_ms").unwrap();
    assert_eq!(v.eval(&mut |p| (p.field_path() == "timeout").then_some(3)), Ok(3000));
    assert_eq!(r.global_value("nclients").unwrap().text(), "old + 1");
    assert_eq!(r.default_value("client", "quota").unwrap().as_constant(), Some(1000));
    assert_eq!(r.global_default("verbose").unwrap().as_constant(), Some(1));
    assert_eq!(r.keep("command_table"), Some(Keep::New));
    assert_eq!(r.keep("other"), None);
    assert_eq!(r.slot_type("struct dictEntry", "v.val"), Some("struct robj"));
    assert_eq!(r.variable_slot_type("cookie"), Some("opaque"));
    let u = r.union_rule("struct value", "u").unwrap();
    let enums = |n: &str| (n == "KIND_STR").then_some(1);
    assert_eq!([1, 2, 3].map(|v| u.member(v, enums)), [Some("str"), Some("num"), Some("raw")]);
    assert!(r.fds().leaves(7, "") && r.fds().leaves(1, "/var/log/kv.log") && !r.fds().leaves(1, "/x"));
    assert_eq!(r.boot().timeout_s, Some(20));
    assert_eq!(r.boot().argv(&[b"old".to_vec()])[0], b"./kv");
    assert_eq!(
        r.boot().envp(&[b"A=1".to_vec(), b"OLD_FLAG=x".to_vec(), b"KV_DEBUG=0".to_vec()]),
        [b"A=1".to_vec(), b"KV_DEBUG=1".to_vec()]
    );
    assert!(!r.is_empty() && r.names().iter().any(|n| n.name == "struct robj" && n.side == Side::Old));
    assert_eq!(r.names().iter().find(|n| n.name == "nconns").unwrap().line, 7);
}

#[test]
fn no_rules_change_nothing() {
    let r = Rules::default();
    assert!(r.is_empty() && parse("").unwrap().is_empty());
    assert_eq!((r.new_type("t"), r.new_field("t", "f"), r.new_global("g")), ("t", "f", "g"));
    assert_eq!(r.boot().argv(&[b"a".to_vec()]), [b"a".to_vec()]);
}

#[test]
fn quiescent_stacks_match_a_run_of_program_frames() {
    let r = parse(ALL).unwrap();
    let sig = |v: &[&str]| v.iter().map(|s| (*s).to_owned()).collect::<Vec<_>>();
    let q = &r.quiescent()[0];
    assert!(q.matches(&sig(&["epoll_wait", "libev.so+0x10", "event_loop", "main"])));
    assert!(!q.matches(&sig(&["epoll_wait", "other", "event_loop", "main"])));
    assert!(!q.matches(&sig(&["epoll_wait"])));
    assert_eq!(q.safe_when.as_ref().unwrap().paths()[0].to_string(), "server.loading");
}

#[test]
fn errors_name_the_line_and_suggest() {
    for (text, line, needles) in [
        ("\n[rename.global]\na = \"b\"", 2, &["unknown field `global`", "did you mean `globals`"][..]),
        ("[keep]\nx = \"both\"", 2, &["both", "\"old\" or \"new\""]),
        ("[values]\n\n\"struct a.b\" = \"old.x *\"", 3, &["column 8"]),
        ("[values]\n\"struct a.b\" = \"timeout * 2\"", 2, &["write `old.timeout`"]),
        ("[rename.fields]\n\"timeout\" = \"t\"", 2, &["names no field"]),
        ("[rename.fields]\n\"struct a.b\" = \"struct a.c\"", 2, &["\"struct a.b\" = \"c\""]),
        ("[rename.globals]\na = \"c\"\nb = \"c\"", 3, &["two old globals", "line 2"]),
        ("[[quiescent]]\nstack = []", 1, &["mcr quiesce"]),
        ("[boot]\nargs = [\"x\"]", 2, &["did you mean `argv`"]),
        ("[defaults]\n\"struct a.b\" = 1.5", 2, &["expected a number"]),
        ("[unions.\"struct a.b\"]\nby = \"kind\"\ncases = {}", 1, &["write `old.kind`"]),
        ("x = [", 1, &[]),
    ] {
        let e = parse(text).unwrap_err().to_string();
        assert!(e.contains(&format!("r.toml, line {line}:")), "{text}\n{e}");
        for n in needles {
            assert!(e.contains(n), "{text}\n{e}\n(wanted {n})");
        }
    }
    let e = Rules::load(Path::new("/nonexistent/r.toml")).unwrap_err().to_string();
    assert!(e.contains("/nonexistent/r.toml"));
}
