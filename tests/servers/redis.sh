#!/bin/sh
# Fetches the Redis sources of Debian trixie (8.0.2) and sid (8.0.6) with apt into a cache and builds each once,
# plainly: MALLOC=libc, -g -O2. Usage: redis.sh CACHEDIR; prints "VERSION PATH" for every server it has.
# Exit 77: not possible on this machine; the reason is on stderr.
set -eu
cache=$1
mkdir -p "$cache"
cd "$cache"
skip() { echo "$*" >&2; exit 77; }
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
for tool in apt-get make g++ tar; do command -v $tool >/dev/null || skip "no $tool to fetch or build Redis with"; done
# The mirror and the key are the ones this machine already uses.
mirror=$(cat /etc/apt/sources.list /etc/apt/sources.list.d/* 2>/dev/null |
	awk '/^URIs:/ { print $2; exit } /^deb / { for (i = 2; i <= NF; i++) if ($i ~ /^[a-z+]+:\/\//) { print $i; exit } }')
[ -n "$mirror" ] || skip "no Debian mirror configured in /etc/apt"
key=$(ls /usr/share/keyrings/debian-archive-keyring.* 2>/dev/null | head -n 1)
[ -n "$key" ] || skip "no debian-archive-keyring"
mkdir -p apt/parts apt/lists/partial apt/cache/archives/partial
printf 'Types: deb-src\nURIs: %s\nSuites: trixie sid\nComponents: main\nSigned-By: %s\n' "$mirror" "$key" >apt/parts/src.sources
cat >apt/apt.conf <<EOF
Dir::Etc::sourcelist "/dev/null";
Dir::Etc::sourceparts "$cache/apt/parts";
Dir::State::lists "$cache/apt/lists";
Dir::Cache "$cache/apt/cache";
EOF
APT_CONFIG=$cache/apt/apt.conf
export APT_CONFIG
apt-get update >apt/update.log 2>&1 || skip "apt-get update failed: $(tail -n 1 apt/update.log)"
versions=$(apt-cache showsrc redis 2>/dev/null | awk '/^Version:/ { print $2 }' | sort -u)
[ -n "$versions" ] || skip "the mirror lists no redis source package"
for v in $versions; do
	apt-get source --download-only "redis=$v" >apt/source.log 2>&1 || echo "redis $v: $(tail -n 1 apt/source.log)" >&2
done
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
