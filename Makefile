# `make demo` and `make test` set up everything they need by themselves, on Debian or Ubuntu with Go, as root.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup build generate check-generated lint test test-short demo bench test-kernels clean

GO ?= go
BIN := allocsnoop
# Where distributions and go.dev put Go when PATH does not say.
export PATH := $(PATH):/usr/local/go/bin:/usr/lib/go/bin
# -p 1: packages that load BPF programs or measure must not disturb each other.
TESTFLAGS ?= -race -count=1 -p 1 -timeout 20m
PKG ?= ./...
KERNELS ?= all

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(firstword $(MAKEFILE_LIST)) | expand -t 18

setup: ## install the Debian packages that tests and demo need (root)
	@./test/setup.sh
	@./test/browser/setup.sh

build: ## ./allocsnoop, one static binary
	CGO_ENABLED=0 $(GO) build -trimpath -o $(BIN) ./cmd/allocsnoop

generate: ## compile bpf/*.c with clang 14 and write the Go files beside them
	$(GO) generate ./bpf/... ./test/unwind/

check-generated: ## fail when a fresh `make generate` differs from the committed files
	@./test/check-generated.sh

lint: ## gofmt, go vet, clang-format
	@out=$$(gofmt -l $$(find . -name '*.go' -not -path './.git/*')); \
	  [ -z "$$out" ] || { echo "gofmt -w these files:"; echo "$$out"; exit 1; }
	$(GO) vet ./...
	@files=$$(find bpf -name '*.[ch]' 2>/dev/null || true); \
	  [ -z "$$files" ] || clang-format --dry-run -Werror $$files

test: setup build lint check-generated ## everything, BPF tests too (root)
	$(GO) build -race ./...
	$(GO) test $(TESTFLAGS) $(PKG)

test-short: ## the quick tests only, nothing is installed
	$(GO) test -short -p 1 $(PKG)

demo: setup build ## trace a leaking nginx worker for 10 s and say how to open the profile
	@./test/demo.sh

bench: build ## all benchmarks; writes docs/benchmarks.md (takes long)
	@./test/setup.sh bench/packages.txt
	$(GO) run ./test/bench/cmd/bench
	$(GO) run ./test/bench/symbols
	$(GO) test ./test/unwind -run xxx -bench 'Event|Publish'
	$(GO) test ./tracer/unwind/internal/ehframe -run xxx -bench Extract

test-kernels: setup ## the BPF programs and the tracer on other kernels, in virtual machines (KERNELS="5.10 6.1")
	$(GO) test ./test/kernels/ -count=1 -v -timeout 60m -kernels="$(KERNELS)"

clean: ## remove what the build made
	rm -rf $(BIN) bin demo.pb.gz
