#!/bin/sh
# ngIRCd of Debian trixie and sid (27 and 28, adjacent releases), built plainly with -g -O2.
# Usage: ngircd.sh CACHEDIR; prints "VERSION PATH" for every server it has, older first.
. "$(dirname "$0")/source.sh"
begin ngircd src/ngircd/ngircd 2
fetch "trixie sid"
make_ngircd() {
	./configure CFLAGS="-g -O2" --without-openssl --without-ident --without-tcp-wrappers --without-syslog &&
		make -j"$(nproc)"
}
for v in $versions; do
	unpack "$v" "source-$v"
	build "$v" make_ngircd
done
finish
