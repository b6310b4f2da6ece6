# sbxrun. `make help` lists what there is; `make demo` and `make test` need nothing else first.

GO      ?= go
ifeq ($(origin CC),default)
CC      := gcc
endif
PREFIX  ?= /usr/local
DESTDIR ?=
VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
# Tests run two packages at a time at most: privileged ones measure limits.
TEST_P       ?= 2
TEST_TIMEOUT ?= 20m
TEST_FLAGS   ?=
FUZZTIME     ?= 20s
GOLANGCI_VERSION := v2.15.0

export GOFLAGS := $(strip $(GOFLAGS) -trimpath -buildvcs=false)
LDFLAGS := -s -w
init    := runtime/pid1/init.bin
gofiles  = $(shell git ls-files -co --exclude-standard -- '*.go' 2>/dev/null)

.DEFAULT_GOAL := help
.PHONY: help setup build init demo test test-vm test-unit check lint fuzz bench install uninstall clean
.DELETE_ON_ERROR:

help: ## show this list
	@echo "sbxrun: a Linux sandbox runtime for code that you do not trust. Targets:"
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | while IFS="$$(printf '\t')" read -r t d; do printf '  %-10s %s\n' "$$t" "$$d"; done
	@echo "Variables: PREFIX DESTDIR VERSION CC GO TEST_P TEST_TIMEOUT TEST_FLAGS VM_LEGS FUZZTIME"

setup: ## install what is missing (Debian, Ubuntu; as root) and check Go's version
	@scripts/setup.sh

# The sandbox's pid 1: freestanding C, no libc; embedded by go:embed.
$(init): $(wildcard runtime/pid1/init/*.c runtime/pid1/init/*.h)
	$(CC) -std=gnu11 -Os -Wall -Wextra -Werror -static -nostdlib -ffreestanding -fno-stack-protector \
		-fno-asynchronous-unwind-tables -fno-pie -no-pie -fno-tree-loop-distribute-patterns \
		-Wl,--build-id=none -Wl,-z,noexecstack -Wl,-z,norelro -s -o $@.tmp runtime/pid1/init/init.c
	mv $@.tmp $@

init: $(init) ## build runtime/pid1/init.bin, the sandbox's pid 1

build: setup $(init) ## build bin/sbxrun, bin/sbxrun-net (networks), bin/sbxrun-env (environments; all without cgo) and bin/sbxrun-oci (the libcontainer engine)
	CGO_ENABLED=0 $(GO) build -ldflags '$(LDFLAGS) -X main.version=$(VERSION)' -o bin/sbxrun ./cmd/sbxrun
	CGO_ENABLED=0 $(GO) build -ldflags '$(LDFLAGS)' -o bin/sbxrun-net ./cmd/sbxrun-net
	CGO_ENABLED=0 $(GO) build -ldflags '$(LDFLAGS) -X main.version=$(VERSION)' -o bin/sbxrun-env ./cmd/sbxrun-env
	CGO_ENABLED=1 $(GO) build -tags seccomp -ldflags '$(LDFLAGS) -X main.version=$(VERSION)' -o bin/sbxrun-oci ./cmd/sbxrun-oci

demo: build ## run a real project's test suite in a sandbox, packages from the index (as root)
	@scripts/demo.sh

test: build ## set up and run every test that this machine can run; ends with the counts
	@scripts/setup.sh test
	$(GO) run ./test/cmd/tally -- $(GO) test -json -count=1 -p $(TEST_P) -timeout $(TEST_TIMEOUT) $(TEST_FLAGS) ./...

test-vm: setup $(init) ## privileged tests in emulated guests with cgroup v2, other kernels, systemd (no KVM; VM_LEGS)
	@scripts/setup.sh vm
	$(GO) run ./test/cmd/tally -- test/vm/run $(VM_LEGS)

test-unit: $(init) ## only the tests that need no privilege (-short)
	$(GO) run ./test/cmd/tally -- $(GO) test -json -short -count=1 -p $(TEST_P) -timeout $(TEST_TIMEOUT) $(TEST_FLAGS) ./...

check: lint test ## lint, then all tests that CI runs

lint: $(init) ## gofmt, go vet, and golangci-lint (installed, or by `go run` at a pinned version)
	@out="$$(gofmt -l $(gofiles))"; if [ -n "$$out" ]; then echo "gofmt -w these:"; echo "$$out"; exit 1; fi
	$(GO) vet ./...
	@if command -v golangci-lint >/dev/null 2>&1 && golangci-lint version 2>&1 | grep -q 'version v\?2\.'; then \
		echo golangci-lint run; golangci-lint run; \
	elif GOFLAGS= $(GO) run github.com/golangci/golangci-lint/v2/cmd/golangci-lint@$(GOLANGCI_VERSION) version >/dev/null 2>&1; then \
		echo "golangci-lint run ($(GOLANGCI_VERSION))"; GOFLAGS= $(GO) run github.com/golangci/golangci-lint/v2/cmd/golangci-lint@$(GOLANGCI_VERSION) run; \
	else \
		echo "lint: golangci-lint $(GOLANGCI_VERSION) CANNOT BE HAD HERE: only gofmt and go vet were run"; \
	fi

fuzz: $(init) ## run every fuzz target for FUZZTIME
	@grep -rlE '^func Fuzz' --include='*_test.go' . | while read -r f; do \
		sed -n 's/^func \(Fuzz[A-Za-z0-9_]*\).*/\1/p' "$$f" | while read -r t; do \
			echo "== $$t ($$(dirname "$$f"))"; \
			$(GO) test -run '^$$' -fuzz "^$$t\$$" -fuzztime $(FUZZTIME) -fuzzminimizetime 1x "$$(dirname "$$f")" || exit 1; \
		done || exit 1; \
	done

bench: build ## measure launches against every peer found here (as root, 3 minutes; BENCH_FLAGS=-quick: 1)
	CC=$(CC) $(GO) run ./test/bench $(BENCH_FLAGS)

# What install puts where; uninstall removes exactly that.
units   := sbxrun.slice sbxrun@.service sbxrun-gc.service sbxrun-gc.timer
unitdir := $(DESTDIR)$(PREFIX)/lib/systemd/system

install: build ## copy the binaries to DESTDIR/PREFIX/bin, systemd's units to DESTDIR/PREFIX/lib/systemd/system
	install -D -m 0755 bin/sbxrun "$(DESTDIR)$(PREFIX)/bin/sbxrun"
	install -D -m 0755 bin/sbxrun-net "$(DESTDIR)$(PREFIX)/bin/sbxrun-net"
	install -D -m 0755 bin/sbxrun-env "$(DESTDIR)$(PREFIX)/bin/sbxrun-env"
	install -D -m 0755 bin/sbxrun-oci "$(DESTDIR)$(PREFIX)/bin/sbxrun-oci"
	install -d -m 0755 "$(unitdir)"
	@for u in $(units); do \
		sed 's#/usr/local/bin/sbxrun#$(PREFIX)/bin/sbxrun#' "packaging/$$u" >"$(unitdir)/$$u.tmp" && \
		chmod 0644 "$(unitdir)/$$u.tmp" && mv "$(unitdir)/$$u.tmp" "$(unitdir)/$$u" && echo "$(unitdir)/$$u" || exit 1; \
	done

uninstall: ## remove what install put there (the store in /var/lib/sbxrun stays)
	rm -f "$(DESTDIR)$(PREFIX)/bin/sbxrun" "$(DESTDIR)$(PREFIX)/bin/sbxrun-net" "$(DESTDIR)$(PREFIX)/bin/sbxrun-env" "$(DESTDIR)$(PREFIX)/bin/sbxrun-oci" $(foreach u,$(units),"$(unitdir)/$(u)")

clean: ## remove what was built (environments in /var/lib/sbxrun stay: sbxrun env prune)
	rm -rf bin build $(init) $(init).tmp
