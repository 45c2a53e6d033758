# To be sourced, with $cache set: Debian source packages by apt, without touching the machine's own configuration.
# Exit 77: not possible on this machine; the reason is on stderr.
skip() { echo "$*" >&2; exit 77; }

# fetch PACKAGE SUITES [VERSION-PREFIX]: the upstream tarballs of every version in these suites into the cache.
fetch() {
	for tool in apt-get make g++ tar; do command -v $tool >/dev/null || skip "no $tool to fetch or build $1 with"; done
	# The mirror and the key are the ones this machine already uses.
	mirror=$(cat /etc/apt/sources.list /etc/apt/sources.list.d/* 2>/dev/null |
		awk '/^URIs:/ { print $2; exit } /^deb / { for (i = 2; i <= NF; i++) if ($i ~ /^[a-z+]+:\/\//) { print $i; exit } }')
	[ -n "$mirror" ] || skip "no Debian mirror configured in /etc/apt"
	key=$(ls /usr/share/keyrings/debian-archive-keyring.* 2>/dev/null | head -n 1)
	[ -n "$key" ] || skip "no debian-archive-keyring"
	mkdir -p apt/parts apt/lists/partial apt/cache/archives/partial
	printf 'Types: deb-src\nURIs: %s\nSuites: %s\nComponents: main\nSigned-By: %s\n' "$mirror" "$2" "$key" >apt/parts/src.sources
	cat >apt/apt.conf <<EOF
Dir::Etc::sourcelist "/dev/null";
Dir::Etc::sourceparts "$cache/apt/parts";
Dir::State::lists "$cache/apt/lists";
Dir::Cache "$cache/apt/cache";
EOF
	APT_CONFIG=$cache/apt/apt.conf
	export APT_CONFIG
	apt-get update >apt/update.log 2>&1 || skip "apt-get update failed: $(tail -n 1 apt/update.log)"
	versions=$(apt-cache showsrc "$1" 2>/dev/null | awk '/^Version:/ { print $2 }' | grep "^${3:-}" | sort -u)
	[ -n "$versions" ] || skip "the mirror lists no $1 source package"
	for v in $versions; do
		apt-get source --download-only "$1=$v" >apt/source.log 2>&1 || echo "$1 $v: $(tail -n 1 apt/source.log)" >&2
	done
}
