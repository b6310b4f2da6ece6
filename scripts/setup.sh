#!/bin/sh
# Makes a Debian or Ubuntu machine ready to build, test and demonstrate sbxrun.
# Does nothing, quickly, when everything is there; `make setup` calls it, and
# `make test` with "test", for what only tests need, `make test-vm` with "vm", for
# what the guests of test/vm are built and run with.
set -eu

packages="gcc libc6-dev libseccomp-dev pkg-config python3 python3-venv python3-pip ca-certificates e2fsprogs git"
if [ "${1:-}" = test ]; then
	# A registry and other tools for images, which environments are sent to and read by.
	packages="$packages docker-registry skopeo umoci"
	# mkfs.erofs for layers that are images.
	packages="$packages erofs-utils"
	# The other architecture's compiler: pid 1 must compile for both.
	case "$(uname -m)" in
	x86_64) packages="$packages gcc-aarch64-linux-gnu" ;;
	aarch64) packages="$packages gcc-x86-64-linux-gnu" ;;
	esac
fi
if [ "${1:-}" = vm ]; then
	packages="$packages qemu-system-x86 qemu-utils mmdebstrap debian-archive-keyring erofs-utils busybox-static kmod cpio xz-utils zstd"
fi
go_wanted=26 # minor version: go 1.26

say() { printf 'setup: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

[ "$(uname -s)" = Linux ] || die "sbxrun runs on Linux only (this is $(uname -s))"

if command -v dpkg-query >/dev/null 2>&1 && command -v apt-get >/dev/null 2>&1; then
	missing=
	for p in $packages; do
		case "$(dpkg-query -W -f '${db:Status-Status}' "$p" 2>/dev/null || true)" in
		installed) ;;
		*) missing="$missing $p" ;;
		esac
	done
	if [ -n "$missing" ]; then
		[ "$(id -u)" = 0 ] || die "not root, cannot install; run: sudo apt-get install --no-install-recommends$missing"
		say "installing:$missing"
		export DEBIAN_FRONTEND=noninteractive
		# shellcheck disable=SC2086 # a list of words
		apt-get install -y -q --no-install-recommends $missing </dev/null >&2 ||
			{ apt-get update -q </dev/null >&2 && apt-get install -y -q --no-install-recommends $missing </dev/null >&2; } ||
			die "apt-get could not install:$missing"
		# Tests start a registry of their own; the package's is not wanted.
		case "$missing" in *docker-registry*)
			[ ! -d /run/systemd/system ] || systemctl disable --quiet --now docker-registry 2>/dev/null || true ;;
		esac
	fi
else
	lacking=
	for c in gcc pkg-config python3 mkfs.ext4 git; do
		command -v "$c" >/dev/null 2>&1 || lacking="$lacking $c"
	done
	pkg-config --exists libseccomp 2>/dev/null || lacking="$lacking libseccomp-headers"
	python3 -m venv --help >/dev/null 2>&1 || lacking="$lacking python3-venv"
	python3 -m pip --version >/dev/null 2>&1 || lacking="$lacking python3-pip"
	[ "${1:-}" != vm ] || for c in qemu-system-x86_64 qemu-img mmdebstrap apt-get mkfs.erofs busybox depmod cpio xz zstd; do
		command -v "$c" >/dev/null 2>&1 || lacking="$lacking $c"
	done
	[ -z "$lacking" ] || die "this is not Debian or Ubuntu, so install these yourself: a C compiler with the static C library's headers, pkg-config, libseccomp's headers, python3 with venv and pip, CA certificates, e2fsprogs, git (missing here:$lacking)"
fi

command -v go >/dev/null 2>&1 || die "Go is missing: sbxrun needs Go 1.$go_wanted or newer; see https://go.dev/doc/install, then put its bin folder on PATH"
# With a Go of 1.21 or newer this downloads the toolchain that go.mod asks for.
have=$(go env GOVERSION 2>/dev/null || true)
minor=$(printf '%s' "$have" | sed -n 's/^go1\.\([0-9]*\).*/\1/p')
[ -n "$minor" ] && [ "$minor" -ge "$go_wanted" ] ||
	die "found ${have:-an old Go}, but sbxrun needs Go 1.$go_wanted or newer; see https://go.dev/doc/install"
