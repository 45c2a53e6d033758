#!/bin/sh
# Fetches the Redis sources of Debian trixie (8.0.2) and sid (8.0.6) with apt into a cache and builds each once,
# plainly: MALLOC=libc, -g -O2. Usage: redis.sh CACHEDIR; prints "VERSION PATH" for every server it has.
# Exit 77: not possible on this machine; the reason is on stderr.
set -eu
cache=$1
mkdir -p "$cache"
. "$(dirname "$0")/source.sh"
cd "$cache"
have() { ls -d "$cache"/redis-*/src/redis-server 2>/dev/null || true; }
report() {
	for s in $(have); do
		d=${s%/src/redis-server}
		echo "${d##*/redis-} $s"
	done
}
if [ "$(have | wc -l)" -ge 2 ]; then report; exit 0; fi
exec 9>"$cache/lock"
command -v flock >/dev/null && flock 9
if [ "$(have | wc -l)" -ge 2 ]; then report; exit 0; fi
fetch redis "trixie sid"
for tar in redis_*.orig.tar.gz; do
	[ -e "$tar" ] || skip "no redis source could be fetched"
	v=${tar#redis_}
	v=${v%.orig.tar.gz}
	rm -rf "building-$v"
	mkdir "building-$v"
	tar xf "$tar" -C "building-$v" --strip-components=1
	(
		cd "building-$v"
		make -C deps hiredis linenoise lua hdr_histogram fpconv fast_float xxhash >../build-$v.log 2>&1
		make -C src -j"$(nproc)" redis-server MALLOC=libc OPTIMIZATION=-O2 DEBUG=-g BUILD_TLS=no USE_SYSTEMD=no >>../build-$v.log 2>&1
	) || { echo "redis $v does not build, see $cache/build-$v.log" >&2; continue; }
	mv "building-$v" "redis-$v"
done
[ "$(have | wc -l)" -ge 2 ] || skip "fewer than two Redis versions could be built"
report
