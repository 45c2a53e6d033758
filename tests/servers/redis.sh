#!/bin/sh
# Redis of Debian trixie (8.0.2) and sid (8.0.6), built plainly: MALLOC=libc, -g -O2. And of the newer one a build that
# crashes when HMGET is asked of a string: "VERSION-hmget".
# Usage: redis.sh CACHEDIR; prints "VERSION PATH" for every server it has, older first.
. "$(dirname "$0")/source.sh"
begin redis src/redis-server 3
fetch "trixie sid"
make_redis() {
	make -C deps hiredis linenoise lua hdr_histogram fpconv fast_float &&
		make -C src -j"$(nproc)" redis-server MALLOC=libc OPTIMIZATION=-O2 DEBUG=-g BUILD_TLS=no USE_SYSTEMD=no
}
for v in $versions; do
	[ -x "redis-$v/src/redis-server" ] && continue
	unpack "$v" "source-$v"
	build "$v" make_redis
done
newest=${versions##* }
rm -rf "building-$newest-hmget"
cp -r "redis-$newest" "building-$newest-hmget"
break_hmget() {
	sed -i '/^void hmgetCommand/,/^}/s/if (checkType(c,o,OBJ_HASH)) return;/checkType(c,o,OBJ_HASH);/' src/t_hash.c &&
		! cmp -s src/t_hash.c "../redis-$newest/src/t_hash.c" &&
		make_redis
}
build "$newest-hmget" break_hmget
finish
