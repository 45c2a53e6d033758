#!/bin/sh
# Fetches the ngIRCd sources of two Debian suites (27 and 28, adjacent releases) with apt into a cache and builds them
# plainly with -g -O2.
# Usage: ngircd.sh CACHEDIR; prints "VERSION PATH" for each server built, older first.
# Exit 77: not possible on this machine; the reason is on stderr.
set -eu
cache=$1
mkdir -p "$cache"
. "$(dirname "$0")/source.sh"
cd "$cache"
have() { ls -d "$cache"/ngircd-*/src/ngircd/ngircd 2>/dev/null | sort -V || true; }
report() {
	for s in $(have); do
		v=${s%/src/ngircd/ngircd}
		echo "${v##*/ngircd-} $s"
	done
}
if [ "$(have | wc -l)" -ge 2 ]; then report; exit 0; fi
exec 9>"$cache/lock"
command -v flock >/dev/null && flock 9
if [ "$(have | wc -l)" -ge 2 ]; then report; exit 0; fi
fetch ngircd "trixie sid"
for tar in ngircd_*.orig.tar.?z; do
	[ -e "$tar" ] || skip "no ngircd source could be fetched"
	v=${tar#ngircd_}
	v=${v%.orig.tar.?z}
	rm -rf "ngircd-$v" "building-$v"
	mkdir "building-$v"
	tar xf "$tar" -C "building-$v" --strip-components=1
	(
		cd "building-$v"
		./configure CFLAGS="-g -O2" --without-openssl --without-ident --without-tcp-wrappers --without-syslog
		make -j"$(nproc)"
	) >"$v.log" 2>&1 || { echo "ngircd $v does not build, see $cache/$v.log" >&2; continue; }
	mv "building-$v" "ngircd-$v"
done
[ "$(have | wc -l)" -ge 2 ] || skip "no two versions of ngircd could be fetched and built"
report
