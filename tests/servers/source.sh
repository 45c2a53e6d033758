# To be sourced by a server's script, which gets the cache's path: what all of them do.
# Exit 77: not possible on this machine; the reason is on stderr.
set -eu
mkdir -p "$1"
cd "$1"
cache=$(pwd)
skip() { echo "$*" >&2; exit 77; }

# The servers that are built, older first: "VERSION PATH".
report() {
	for path in $(ls -d "$cache/$name"-*/"$program" 2>/dev/null | sort -V); do
		version=${path#"$cache/$name-"}
		echo "${version%%/*} $path"
	done
}
complete() { [ "$(report | wc -l)" -ge "$count" ]; }

# begin NAME PROGRAM COUNT: if so many are in the cache as NAME-VERSION/PROGRAM, prints them and ends the script;
# else nobody but us builds there from now on.
begin() {
	name=$1 program=$2 count=$3
	if complete; then report; exit 0; fi
	exec 9>lock
	command -v flock >/dev/null && flock 9
	if complete; then report; exit 0; fi
	for tool in make cc g++ tar; do command -v $tool >/dev/null || skip "no $tool to build $name with"; done
}

# build VERSION COMMAND: runs COMMAND in the directory `building-VERSION`, which then is the server's.
build() {
	(cd "building-$1" && $2 "$1") >"$1.log" 2>&1 || { echo "$name $1 does not build, see $cache/$1.log" >&2; return 0; }
	rm -rf "$name-$1"
	mv "building-$1" "$name-$1"
}

# unpack VERSION TARBALL: into `building-VERSION`.
unpack() {
	rm -rf "building-$1"
	mkdir "building-$1"
	tar xf "$2" -C "building-$1" --strip-components=1
}

finish() {
	complete || skip "fewer than $count builds of $name could be made"
	report
}

# fetch SUITES: the upstream tarballs of every version in these Debian suites by apt, without touching the machine's own
# configuration. Each is then at `source-VERSION`, and VERSION in `versions`.
fetch() {
	command -v apt-get >/dev/null || skip "no apt-get to fetch $name with"
	# The mirror and the key are the ones this machine already uses.
	mirror=$(cat /etc/apt/sources.list /etc/apt/sources.list.d/* 2>/dev/null |
		awk '/^URIs:/ { print $2; exit } /^deb / { for (i = 2; i <= NF; i++) if ($i ~ /^[a-z+]+:\/\//) { print $i; exit } }')
	[ -n "$mirror" ] || skip "no Debian mirror configured in /etc/apt"
	key=$(ls /usr/share/keyrings/debian-archive-keyring.* 2>/dev/null | head -n 1)
	[ -n "$key" ] || skip "no debian-archive-keyring"
	mkdir -p apt/parts apt/lists/partial apt/cache/archives/partial
	printf 'Types: deb-src\nURIs: %s\nSuites: %s\nComponents: main\nSigned-By: %s\n' "$mirror" "$1" "$key" >apt/parts/src.sources
	cat >apt/apt.conf <<EOF
Dir::Etc::sourcelist "/dev/null";
Dir::Etc::sourceparts "$cache/apt/parts";
Dir::State::lists "$cache/apt/lists";
Dir::Cache "$cache/apt/cache";
EOF
	APT_CONFIG=$cache/apt/apt.conf
	export APT_CONFIG
	apt-get update >apt/update.log 2>&1 || skip "apt-get update failed: $(tail -n 1 apt/update.log)"
	all=$(apt-cache showsrc "$name" 2>/dev/null | awk '/^Version:/ { print $2 }' | sort -u)
	[ -n "$all" ] || skip "the mirror lists no $name source package"
	for v in $all; do
		apt-get source --download-only "$name=$v" >apt/source.log 2>&1 || echo "$name $v: $(tail -n 1 apt/source.log)" >&2
	done
	versions=
	for tar in "$name"_*.orig.tar.?z; do
		[ -e "$tar" ] || skip "no $name source could be fetched"
		v=${tar#"$name"_}
		v=${v%.orig.tar.?z}
		[ -L "source-$v" ] || ln -s "$tar" "source-$v"
		versions="$versions $v"
	done
}
