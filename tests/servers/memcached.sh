#!/bin/sh
# Fetches the memcached source of Debian trixie (1.6.38) with apt into a cache and builds it twice, plainly with
# -g -O2: as it is, and with members inserted at the front of `struct conn` and `struct settings`.
# Usage: memcached.sh CACHEDIR; prints "plain PATH" and "changed PATH".
# Exit 77: not possible on this machine; the reason is on stderr.
set -eu
cache=$1
mkdir -p "$cache"
. "$(dirname "$0")/source.sh"
cd "$cache"
report() { for b in plain changed; do echo "$b $cache/$b/memcached"; done; }
ready() { [ -x plain/memcached ] && [ -x changed/memcached ]; }
if ready; then report; exit 0; fi
exec 9>"$cache/lock"
command -v flock >/dev/null && flock 9
if ready; then report; exit 0; fi
echo '#include <event.h>' | cc -E - >/dev/null 2>&1 || skip "no event.h to build memcached with (apt-get install libevent-dev)"
fetch memcached trixie
tar=$(ls memcached_*.orig.tar.* 2>/dev/null | grep -v '\.asc$' | head -n 1)
[ -n "$tar" ] || skip "no memcached source could be fetched"
for build in plain changed; do
	rm -rf "$build" "building-$build"
	mkdir "building-$build"
	tar xf "$tar" -C "building-$build" --strip-components=1
	(
		cd "building-$build"
		if [ $build = changed ]; then
			sed -i -e 's/^struct conn {/&\n    unsigned long mcr_seen;/' -e 's/^struct settings {/&\n    int mcr_mode;\n    long mcr_limit;/' memcached.h
			[ "$(grep -c mcr_ memcached.h)" = 3 ] || { echo "the structs are not where they were"; exit 1; }
		fi
		./configure CFLAGS="-g -O2" --disable-extstore --disable-docs
		make -j"$(nproc)" memcached
	) >"$build.log" 2>&1 || skip "memcached does not build, see $cache/$build.log"
	mv "building-$build" "$build"
done
report
