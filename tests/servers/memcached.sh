#!/bin/sh
# memcached of Debian trixie (1.6.38), built twice, plainly with -g -O2: as it is, and with members inserted at the
# front of `struct conn` and `struct settings`.
# Usage: memcached.sh CACHEDIR; prints "changed PATH" and "plain PATH".
. "$(dirname "$0")/source.sh"
begin memcached memcached 2
echo '#include <event.h>' | cc -E - >/dev/null 2>&1 || skip "no event.h to build memcached with (apt-get install libevent-dev)"
fetch trixie
make_memcached() {
	if [ "$1" = changed ]; then
		sed -i -e 's/^struct conn {/&\n    unsigned long mcr_seen;/' -e 's/^struct settings {/&\n    int mcr_mode;\n    long mcr_limit;/' memcached.h
		[ "$(grep -c mcr_ memcached.h)" = 3 ] || { echo "the structs are not where they were"; return 1; }
	fi
	./configure CFLAGS="-g -O2" --disable-extstore --disable-docs &&
		make -j"$(nproc)" memcached
}
for b in changed plain; do
	unpack $b "source-${versions##* }"
	build $b make_memcached
done
finish
