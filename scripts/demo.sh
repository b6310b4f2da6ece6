#!/bin/sh
# Runs the own test suite of a real project (click) inside a sandbox, against
# packages from the index; `make demo` calls it.
set -eu
cd "$(dirname "$0")/.."

[ "$(id -u)" = 0 ] || { echo "demo: sbxrun needs root: run sudo make demo" >&2; exit 1; }

dir=build/demo
src=$dir/click-8.1.8
if [ ! -d "$src" ]; then
	echo "demo: fetching click's source distribution, checked against its hash" >&2
	mkdir -p "$dir/sdist"
	PIP_CONSTRAINT=examples/demo/build-constraints.txt python3 -m pip download -q \
		--disable-pip-version-check --no-deps --no-binary click --require-hashes \
		-d "$dir/sdist" -r examples/demo/sdist.txt
	tar -xzf "$dir/sdist/click-8.1.8.tar.gz" -C "$dir" --no-same-owner
fi

report=$dir/report.json
run() {
	echo "demo: $1" >&2
	echo "+ bin/sbxrun run -r examples/demo/requirements.txt --project $src --report $report -- pytest -q -p no:cacheprovider" >&2
	bin/sbxrun run -r examples/demo/requirements.txt --project "$src" --report "$report" \
		-- pytest -q -p no:cacheprovider || { code=$?; cat "$report" >&2; exit "$code"; }
	python3 -I - "$report" <<'PY'
import json, sys
r = json.load(open(sys.argv[1]))
keys = "status reason exit_code wall_ms cpu_user_ms memory_peak_bytes pids_peak disk_used_bytes base engine degraded".split()
print("demo: the report says")
for k in keys:
    print(f"    {k:18} {r.get(k)}")
print("    phases_ms          " + "  ".join(f"{k} {v:.1f}" for k, v in (r.get("phases_ms") or {}).items()))
PY
}
run "first run: the environment is baked unless it is there already"
run "second run: nothing is resolved or baked again"
echo "demo: done. The environment stays in ${SBXRUN_ROOT:-/var/lib/sbxrun} (bin/sbxrun env list)." >&2
