# The front door. `make help` lists the targets.
# Two of them are all that a newcomer needs: `make demo` and `make test`. Each does the set-up that it needs.

export BASAL_CACHE ?= $(HOME)/.cache/basal
export CARGO_TARGET_DIR ?= $(BASAL_CACHE)/target
export GOCACHE ?= $(BASAL_CACHE)/go-build
export PATH := $(BASAL_CACHE)/tools/bin:$(BASAL_CACHE)/parts/bin:$(PATH)

.DEFAULT_GOAL := help
.PHONY: help setup test fmt lint crds advisories

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: ## install and build what this machine lacks (Debian packages, BPF toolchain, Kubernetes parts, images)
	cargo xtask setup

test: setup ## run every check and test; the last line is the totals
	@cargo xtask test

fmt: ## format the code
	cargo fmt --all

lint: ## format check, clippy, dependency direction
	cargo fmt --all --check
	cargo clippy --workspace --all-targets -- -D warnings
	cargo xtask deps

crds: ## write the CustomResourceDefinitions as YAML
	cargo xtask crds

advisories: ## check the dependencies against the RustSec database (needs the internet)
	cargo deny check advisories
