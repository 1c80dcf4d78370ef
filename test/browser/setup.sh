#!/bin/bash
# Installs what the browser test needs beside test/packages.txt: npm if there is none, and the locked playwright-core.
set -euo pipefail
cd "$(dirname "$0")"

if [ node_modules/.package-lock.json -nt package-lock.json ]; then exit 0; fi
if ! command -v npm >/dev/null; then
	[ "$(id -u)" = 0 ] || { echo "setup: run as root, or install nodejs and npm first" >&2; exit 1; }
	echo "setup: installing nodejs npm"
	DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300 install -y -qq --no-install-recommends nodejs npm >/dev/null
fi
echo "setup: npm ci in test/browser"
npm ci --ignore-scripts --no-audit --no-fund --loglevel=error >/dev/null
touch node_modules/.package-lock.json
