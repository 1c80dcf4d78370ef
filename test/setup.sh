#!/bin/bash
# Installs the packages of packages.txt, and of other such files named as arguments, that are missing. Quiet and quick
# when nothing is.
set -euo pipefail
cd "$(dirname "$0")"

installed() { [ "$(dpkg-query -W -f '${db:Status-Status}' "$1" 2>/dev/null)" = installed ]; }

# A line may name alternatives, for distributions that call a package otherwise: "libfoo1|libfoo1t64".
have_one() {
	local name
	for name in ${1//|/ }; do
		if installed "$name"; then return 0; fi
	done
	return 1
}

installable() {
	local name
	for name in ${1//|/ }; do
		if apt-cache show --no-all-versions "$name" >/dev/null 2>&1; then
			echo "$name"
			return 0
		fi
	done
	echo "setup: no package ${1//|/ or } in the apt sources" >&2
	return 1
}

command -v go >/dev/null || {
	echo "setup: go is not in PATH; install Go (https://go.dev/dl) and run this again" >&2
	exit 1
}
command -v dpkg-query >/dev/null || {
	echo "setup: this needs Debian or Ubuntu; elsewhere install the like of test/packages.txt by hand" >&2
	exit 1
}

missing=()
while read -r line; do
	have_one "$line" || missing+=("$line")
done < <(sed 's/#.*//; s/[[:space:]]//g; /^$/d' packages.txt "$@" | sort -u)
[ ${#missing[@]} -gt 0 ] || exit 0

[ "$(id -u)" = 0 ] || {
	echo "setup: run as root, or install first: ${missing[*]%%|*}" >&2
	exit 1
}
echo "setup: installing ${missing[*]%%|*}"
export DEBIAN_FRONTEND=noninteractive
wait=(-o DPkg::Lock::Timeout=300)
log=$(mktemp)
policy=/usr/sbin/policy-rc.d
trap 'rm -f "$log"' EXIT
quietly() { "$@" >"$log" 2>&1 </dev/null || { tail -n 30 "$log" >&2; return 1; }; }

# Package lists that are there may be too old to fetch from: refresh them before the second try only.
install() {
	local packages=() line
	for line in "${missing[@]}"; do packages+=("$(installable "$line")") || return 1; done
	quietly apt-get "${wait[@]}" install -y --no-install-recommends "${packages[@]}"
}
# Debian starts a service that it installs, on all interfaces; the tests start their own nginx on loopback.
if [ ! -e $policy ]; then
	printf '#!/bin/sh\nexit 101\n' >$policy
	chmod +x $policy
	trap 'rm -f "$log" $policy' EXIT
fi
if ! install 2>/dev/null; then
	quietly apt-get "${wait[@]}" update
	install
fi
