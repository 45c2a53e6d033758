//! Function names across builds.

/// A function's name without what compilers append to clones and split-off parts: `.cold`, `.part.N`,
/// `.isra.N`, `.constprop.N`, `.lto_priv.N`, `.llvm.N` and combinations.
#[must_use]
pub fn base_name(name: &str) -> &str {
    let mut rest = name;
    loop {
        let Some((head, last)) = rest.rsplit_once('.') else {
            return rest;
        };
        if head.is_empty() {
            return rest;
        }
        if last == "cold" {
            rest = head;
            continue;
        }
        let numbered = !last.is_empty() && last.bytes().all(|b| b.is_ascii_digit());
        let suffix = head.rsplit_once('.').filter(|(h, _)| !h.is_empty());
        match suffix {
            Some((h, "part" | "isra" | "constprop" | "lto_priv" | "llvm" | "cold")) if numbered => rest = h,
            _ => return rest,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::base_name;

    #[test]
    fn suffixes_of_clones_are_removed_and_nothing_else() {
        for (name, base) in [
            ("main", "main"),
            ("serve.cold", "serve"),
            ("serve.part.0", "serve"),
            ("serve.part.0.cold", "serve"),
            ("serve.constprop.12.isra.3", "serve"),
            ("counter.lto_priv.7", "counter"),
            ("static_var.2345", "static_var.2345"),
            (".cold", ".cold"),
            ("a.b", "a.b"),
            (".part.0", ".part.0"),
            ("", ""),
        ] {
            assert_eq!(base_name(name), base, "{name}");
        }
    }
}
