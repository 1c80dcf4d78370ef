#!/bin/bash
# Compiles the BPF programs again, beside a copy of what is committed, and compares. Only the pinned clang gives the
# same bytes, so with another one this says that it did not check; in CI that is a failure.
set -euo pipefail
cd "$(dirname "$0")/.."
[ -d bpf ] || exit 0

pinned='Debian clang version 14.'
version=$(clang --version | head -n 1)
if [[ $version != "$pinned"* ]]; then
	echo "check-generated: not checked, the pinned compiler is \"$pinned*\", this is \"$version\""
	if [ "${CI:-}" = true ]; then exit 1; fi
	exit 0
fi

before=$(mktemp -d)
trap 'rm -rf "$before"' EXIT
generated() { find bpf test/unwind -name '*_bpfe[lb].go' -o -name '*_bpfe[lb].o'; }
generated | xargs -r cp --parents -t "$before"
go generate ./bpf/... ./test/unwind/

status=0
for file in $( (generated; cd "$before" && generated) | sort -u); do
	cmp -s "$file" "$before/$file" || { echo "check-generated: $file differs from a fresh build"; status=1; }
done
[ $status = 0 ] || echo "check-generated: run make generate and commit the result"
exit $status
