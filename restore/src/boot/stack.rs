//! The initial stack of a program, as the kernel builds it (System V ABI x86-64, section 3.4; fs/binfmt_elf.c
//! create_elf_tables): strings at the top, then the auxiliary vector, environment, arguments, and argc.

use mcr_image::Addr;

/// AT_NULL.
pub(super) const AT_NULL: u64 = 0;
pub(super) const AT_PHDR: u64 = 3;
pub(super) const AT_PHENT: u64 = 4;
pub(super) const AT_PHNUM: u64 = 5;
pub(super) const AT_BASE: u64 = 7;
pub(super) const AT_ENTRY: u64 = 9;
pub(super) const AT_PLATFORM: u64 = 15;
pub(super) const AT_RANDOM: u64 = 25;
pub(super) const AT_EXECFN: u64 = 31;
pub(super) const AT_SYSINFO_EHDR: u64 = 33;

/// What goes onto the stack.
pub(super) struct StackSpec<'a> {
    /// End of the stack's mapping.
    pub top: Addr,
    /// Arguments, without NULs.
    pub argv: &'a [Vec<u8>],
    /// Environment, without NULs.
    pub envp: &'a [Vec<u8>],
    /// Path of the program for AT_EXECFN.
    pub execfn: &'a [u8],
    /// The 16 bytes of AT_RANDOM.
    pub random: [u8; 16],
    /// The auxiliary vector; entries that point into the stack are replaced.
    pub auxv: Vec<(u64, u64)>,
}

/// A stack ready to be written.
#[derive(Debug)]
pub(super) struct InitialStack {
    /// The stack pointer, at argc; `bytes` begin here.
    pub rsp: Addr,
    /// Up to the end of the mapping.
    pub bytes: Vec<u8>,
    pub arg_start: Addr,
    pub arg_end: Addr,
    pub env_start: Addr,
    pub env_end: Addr,
    /// The final auxiliary vector as raw words, AT_NULL included.
    pub auxv: Vec<u8>,
}

/// Parses a raw auxiliary vector.
pub(super) fn parse_auxv(raw: &[u8]) -> Vec<(u64, u64)> {
    raw.chunks_exact(16)
        .map(|c| {
            let w = |b: &[u8]| b.try_into().map(u64::from_le_bytes).unwrap_or(0);
            (w(&c[..8]), w(&c[8..]))
        })
        .take_while(|e| e.0 != AT_NULL)
        .collect()
}

impl InitialStack {
    pub(super) fn build(spec: StackSpec<'_>) -> Self {
        // Strings from the top down: 8 zero bytes, execfn, environment, arguments.
        let mut strings: Vec<u8> = Vec::new();
        let mut put = |s: &[u8]| {
            let at = strings.len() as u64;
            strings.extend_from_slice(s);
            strings.push(0);
            at
        };
        let argv: Vec<u64> = spec.argv.iter().map(|s| put(s)).collect();
        let arg_len = argv.len();
        let arg_end =
            if arg_len == 0 { 0 } else { argv[arg_len - 1] + spec.argv[arg_len - 1].len() as u64 + 1 };
        let envp: Vec<u64> = spec.envp.iter().map(|s| put(s)).collect();
        let execfn = put(spec.execfn);
        let env_end = execfn;
        let platform = put(b"x86_64");
        let random = strings.len() as u64;
        strings.extend_from_slice(&spec.random);
        strings.extend_from_slice(&[0; 8]);
        let area = (spec.top.0 - strings.len() as u64) & !15;

        let mut auxv = spec.auxv;
        for (key, value) in [(AT_PLATFORM, platform), (AT_RANDOM, random), (AT_EXECFN, execfn)] {
            match auxv.iter_mut().find(|e| e.0 == key) {
                Some(e) => e.1 = area + value,
                None => auxv.push((key, area + value)),
            }
        }
        auxv.push((AT_NULL, 0));
        let mut words: Vec<u64> = vec![argv.len() as u64];
        words.extend(argv.iter().map(|o| area + o));
        words.push(0);
        words.extend(envp.iter().map(|o| area + o));
        words.push(0);
        let aux_at = words.len();
        words.extend(auxv.iter().flat_map(|e| [e.0, e.1]));
        let rsp = (area - words.len() as u64 * 8) & !15;
        let mut bytes: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
        let raw_auxv = bytes[aux_at * 8..].to_vec();
        bytes.resize((area - rsp) as usize, 0);
        bytes.extend_from_slice(&strings);
        bytes.resize((spec.top.0 - rsp) as usize, 0);
        Self {
            rsp: Addr(rsp),
            bytes,
            arg_start: Addr(area),
            arg_end: Addr(area + arg_end),
            env_start: Addr(area + arg_end),
            env_end: Addr(area + env_end),
            auxv: raw_auxv,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn word(s: &InitialStack, at: u64) -> u64 {
        let o = (at - s.rsp.0) as usize;
        u64::from_le_bytes(s.bytes[o..o + 8].try_into().unwrap())
    }
    fn string(s: &InitialStack, at: u64) -> &[u8] {
        let o = (at - s.rsp.0) as usize;
        let end = s.bytes[o..].iter().position(|&b| b == 0).unwrap();
        &s.bytes[o..o + end]
    }

    #[test]
    fn a_program_finds_its_arguments() {
        let argv = vec![b"/bin/x".to_vec(), b"-p".to_vec(), Vec::new()];
        let envp = vec![b"A=1".to_vec(), b"B=".to_vec()];
        for extra in 0..3u64 {
            let s = InitialStack::build(StackSpec {
                top: Addr(0x7fff_0000_0000),
                argv: &argv,
                envp: &envp,
                execfn: b"/opt/x",
                random: [7; 16],
                auxv: (0..extra).map(|i| (100 + i, i)).chain([(AT_RANDOM, 1)]).collect(),
            });
            assert_eq!(s.rsp.0 % 16, 0);
            assert_eq!(s.rsp.0 + s.bytes.len() as u64, 0x7fff_0000_0000);
            assert_eq!(word(&s, s.rsp.0), 3);
            assert_eq!(string(&s, word(&s, s.rsp.0 + 8)), b"/bin/x");
            assert_eq!(string(&s, word(&s, s.rsp.0 + 24)), b"");
            assert_eq!(word(&s, s.rsp.0 + 32), 0);
            assert_eq!(string(&s, word(&s, s.rsp.0 + 48)), b"B=");
            assert_eq!(word(&s, s.rsp.0 + 56), 0);
            let aux: Vec<(u64, u64)> = parse_auxv(&s.auxv);
            assert_eq!(parse_auxv(&s.bytes[64..]), aux);
            let get = |k| aux.iter().find(|e| e.0 == k).unwrap().1;
            assert_eq!(string(&s, get(AT_EXECFN)), b"/opt/x");
            assert_eq!(string(&s, get(AT_PLATFORM)), b"x86_64");
            let r = (get(AT_RANDOM) - s.rsp.0) as usize;
            assert_eq!(&s.bytes[r..r + 16], &[7; 16]);
            // As /proc/PID/cmdline shows them.
            let (a, e) = ((s.arg_start.0 - s.rsp.0) as usize, (s.arg_end.0 - s.rsp.0) as usize);
            assert_eq!(&s.bytes[a..e], b"/bin/x\0-p\0\0");
            let (a, e) = ((s.env_start.0 - s.rsp.0) as usize, (s.env_end.0 - s.rsp.0) as usize);
            assert_eq!(&s.bytes[a..e], b"A=1\0B=\0");
        }
    }
}
