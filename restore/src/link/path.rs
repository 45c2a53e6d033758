//! Paths from roots to objects, kept as steps: most are never shown to anybody.

/// A path in [`Paths`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Path(u32);

/// One step of a path.
#[derive(Clone, Debug)]
pub(super) enum Step<'a> {
    /// A variable, or whatever a path starts from.
    Root(Box<str>),
    /// A named member.
    Member(&'a str),
    /// An element of an array.
    Index(u64),
    /// What a pointer leads to.
    Deref,
    /// A word of what a pointer leads to, whose type is not known.
    Opaque(u64),
}

/// All paths of a walk: each is a step and the path before it.
#[derive(Default)]
pub(super) struct Paths<'a>(Vec<(Path, Step<'a>)>);

impl<'a> Paths<'a> {
    /// A path that starts here.
    pub(super) fn root(&mut self, name: &str) -> Path {
        self.step(Path(u32::MAX), Step::Root(name.into()))
    }

    /// A path that goes on from `from`.
    pub(super) fn step(&mut self, from: Path, step: Step<'a>) -> Path {
        self.0.push((from, step));
        Path(self.0.len() as u32 - 1)
    }

    /// For people.
    pub(super) fn text(&self, path: Path) -> String {
        let mut steps = Vec::new();
        let mut at = path;
        while let Some((from, step)) = self.0.get(at.0 as usize) {
            steps.push(step);
            at = *from;
        }
        let mut out = String::new();
        for s in steps.into_iter().rev() {
            match s {
                Step::Root(name) => out.push_str(name),
                Step::Member(name) => {
                    if !out.is_empty() && !out.ends_with("->") {
                        out.push('.');
                    }
                    out.push_str(name);
                }
                Step::Index(i) => out.push_str(&format!("[{i}]")),
                Step::Deref => out.push_str("->"),
                Step::Opaque(offset) => out.push_str(&format!("->+{offset:#x}")),
            }
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_reads_as_in_c() {
        let mut p = Paths::default();
        let root = p.root("server");
        let clients = p.step(root, Step::Member("clients"));
        let list = p.step(clients, Step::Deref);
        let head = p.step(list, Step::Member("head"));
        let third = p.step(head, Step::Index(3));
        let word = p.step(third, Step::Opaque(16));
        assert_eq!(p.text(root), "server");
        assert_eq!(p.text(head), "server.clients->head");
        assert_eq!(p.text(word), "server.clients->head[3]->+0x10");
    }
}
