#!/bin/sh
# Redis of Debian trixie (8.0.2) and sid (8.0.6), built plainly: MALLOC=libc, -g -O2.
# Usage: redis.sh CACHEDIR; prints "VERSION PATH" for every server it has, older first.
. "$(dirname "$0")/source.sh"
begin redis src/redis-server 2
fetch "trixie sid"
make_redis() {
	make -C deps hiredis linenoise lua hdr_histogram fpconv fast_float &&
		make -C src -j"$(nproc)" redis-server MALLOC=libc OPTIMIZATION=-O2 DEBUG=-g BUILD_TLS=no USE_SYSTEMD=no
}
for v in $versions; do
	unpack "$v" "source-$v"
	build "$v" make_redis
done
finish
