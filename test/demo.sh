#!/bin/bash
# The demo: a leaking nginx worker under load, ten seconds of allocsnoop on it, and how to look at the result.
set -euo pipefail
cd "$(dirname "$0")/.."

[ "$(id -u)" = 0 ] || { echo "demo: tracing needs root: sudo make demo" >&2; exit 1; }
dir=$(mktemp -d)
service='' load=''
cleanup() {
	[ -z "$load" ] || kill "$load" 2>/dev/null || true
	[ -z "$service" ] || { kill "$service" 2>/dev/null && wait "$service" || true; }
	rm -rf "$dir"
}
trap cleanup EXIT

mkdir -p bin
go build -o bin/scenario ./test/scenario/cmd/scenario
echo "demo: starting nginx with Lua code that calls an encryption library which never frees its session records"
mkfifo "$dir/up"
bin/scenario start >"$dir/up" &
service=$!
read -r line <"$dir/up" || { echo "demo: the service did not start" >&2; exit 1; }
place=$(sed -E 's/.*"dir":"([^"]+)".*/\1/' <<<"$line")
worker=$(sed -E 's/.*"workers":\[([0-9]+).*/\1/' <<<"$line")
echo "demo: $line"

bin/scenario load -dir "$place" -d 15s -c 8 >"$dir/load" 2>&1 &
load=$!
echo "demo: ./allocsnoop --pid $worker --duration 10s --mode exact --content -o demo.pb.gz"
echo
./allocsnoop --pid "$worker" --duration 10s --mode exact --content -o demo.pb.gz
echo
wait "$load" && load=''
echo "demo: the load was $(cat "$dir/load")"
echo "demo: by the library's own count, since it started:"
bin/scenario stats -dir "$place" | sed 's/^/demo:   /'
echo
echo "Open the profile with: go tool pprof -http=: demo.pb.gz"
