#!/bin/sh
# nginx 1.28.0 to 1.28.3, fetched with cargo (the package nginx-src), built plainly: -g -O2.
# Usage: nginx.sh CACHEDIR; prints "VERSION PATH" for every server it has, older first.
. "$(dirname "$0")/source.sh"
begin nginx objs/nginx 4
make_nginx() {
	sh auto/configure --with-cc-opt="-g -O2" --prefix=. --without-http_rewrite_module --without-http_gzip_module &&
		make -j"$(nproc)"
}
# The package's own version is not that of the nginx in it.
for both in 1.28.0:1.28.0 1.28.1:1.28.3 1.28.2:1.28.4 1.28.3:1.28.5; do
	v=${both%:*}
	rm -rf "fetch-$v" "building-$v"
	mkdir -p "fetch-$v/src"
	: >"fetch-$v/src/lib.rs"
	cat >"fetch-$v/Cargo.toml" <<END
[package]
name = "fetch"
version = "0.0.0"
edition = "2021"
[dependencies]
nginx-src = "=${both#*:}"
[workspace]
END
	(cd "fetch-$v" && cargo vendor vendor) >"fetch-$v.log" 2>&1 || skip "cargo does not get it, see $cache/fetch-$v.log"
	for source in "fetch-$v"/vendor/nginx-src/*; do
		if grep -qs "NGINX_VERSION *\"$v\"" "$source/src/core/nginx.h"; then mv "$source" "building-$v"; fi
	done
	[ -d "building-$v" ] || skip "nginx-src ${both#*:} does not hold nginx $v"
	build "$v" make_nginx
	rm -rf "fetch-$v"
done
finish
