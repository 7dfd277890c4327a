# The front door. `make help` lists the targets.
# Two of them are all that a newcomer needs: `make demo` and `make test`. Each does the set-up that it needs.

export BASAL_CACHE ?= $(HOME)/.cache/basal
export CARGO_TARGET_DIR ?= $(BASAL_CACHE)/target
export GOCACHE ?= $(BASAL_CACHE)/go-build
export PATH := $(BASAL_CACHE)/tools/bin:$(BASAL_CACHE)/parts/bin:$(PATH)

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-env demo-down test faults faults-agent faults-mutants soak fuzz fuzz-packets bench-operator bench-ipam bench-agent bench-packets bench-node bench-pods fmt lint crds docs advisories

# Clusters on this machine. `make demo` and its siblings share one that is called demo.
E2E = cargo run --quiet --bin basal-e2e --

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

setup: ## install and build what this machine lacks: Debian packages, BPF toolchain, Kubernetes parts, images (needs root)
	cargo xtask setup

demo: ## boot a Kubernetes cluster with Basal on this machine and show pods talking across nodes (needs root)
	cargo xtask setup --profile release
	$(E2E) down --name demo
	$(E2E) up --name demo
	@$(E2E) demo --name demo

demo-env: ## print shell assignments that point other tools at the demo, for eval
	@$(E2E) env --name demo

demo-down: ## take the demo's cluster down and prove that nothing is left of it
	$(E2E) down --name demo

test: setup ## run every check and test (needs root); the last lines are the time of each rung and the totals
	@cargo xtask test

faults: ## explore SCHEDULES=N random schedules with faults from SEED=S on, or replay SCHEDULE='{…}' (docs/testing.md)
	FAULTS_SCHEDULES='$(SCHEDULES)' FAULTS_SEED='$(SEED)' FAULTS_SCHEDULE='$(SCHEDULE)' cargo nextest run --workspace \
		--profile faults --no-capture -E 'test(random_faults_in_random_schedules)'

faults-agent: ## put PAIRS=N pairs of faults from SEED=S into each scenario of the agent, over each store, place each fault over the real kernel, and let it die before each system call that changes a node (needs root; docs/testing.md)
	FAULTS_PAIRS='$(PAIRS)' FAULTS_SEED='$(SEED)' cargo nextest run --package basal-agent --no-capture -E 'test(pairs_of_faults)'
	FAULTS_EVERY=1 cargo nextest run --package basal-agent --package basal-datapath --profile faults --no-capture \
		-E 'test(/^faults::linux::|^crashes::/)'

faults-mutants: ## break the code that ships in many places, and show which test notices (MUTANTS='…' for some of them)
	cargo xtask mutants $(MUTANTS)

soak: export SOAK_SECONDS ?= 300
soak: setup ## kill, pause and cut off operators and servers for SOAK_SECONDS (300), in the order of SEED; take agents, servers, runtimes, kubelets and records away and change the store under traffic, do without a tunnel (needs root)
	$(E2E) test --exact kills_and_cuts_break_nothing
	$(E2E) test --exact forwarding_goes_on_without_an_agent
	$(E2E) test --exact without_etcd_records_are_custom_resources
	$(E2E) test --exact the_store_changes_under_pods
	$(E2E) test --exact packets_travel_without_a_tunnel

fuzz: T ?= 60
fuzz: ## look with libFuzzer for inputs that break a reader, for T seconds (60) each, or TARGET=cni only
	cargo xtask fuzz --seconds $(T) $(addprefix --target ,$(TARGET))

fuzz-packets: PACKETS ?= 100000
fuzz-packets: ## send PACKETS=100000 packets drawn from SEED through the programs in the kernel, beside the models (needs root)
	cargo xtask setup --only packages,bpf
	cargo xtask ebpf
	PACKETS='$(PACKETS)' SEED='$(SEED)' cargo nextest run --package basal-datapath --profile faults --no-capture \
		-E 'test(/^differential::|^nat_model::/)'

bench-operator: ## measure the operator on a real API server and etcd, NODES=5000,10000 (1000 is a quick run)
	cargo xtask setup --only parts
	cargo bench --package basal-operator --bench scale

bench-ipam: ## measure the allocator alone, with 1 k, 64 k and 1 M blocks
	cargo bench --package basal-ipam --bench allocator

bench-agent: bench-packets bench-node bench-pods ## measure all that follows (needs root)

bench-packets: ## measure how fast packets travel, in rounds of SECONDS_EACH=1 (needs root)
	cargo xtask setup --only packages,bpf
	cargo xtask ebpf
	cargo bench --package basal-datapath --bench forwarding

bench-node: ## measure what the agent costs a node and how quick it is, CASES=pods,size,loaded-pods,records (needs root)
	cargo xtask setup --only packages,bpf,parts
	cargo xtask ebpf
	cargo bench --package basal-agent --bench agent

bench-pods: ## measure how long PODS=100 take in a real cluster, in PASSES=2 clusters of each kind with ROUNDS=2 (needs root)
	cargo xtask setup --profile release
	cargo bench --package basal-e2e --bench pods

fmt: ## format the code
	cargo fmt --all

lint: ## format check, clippy, dependency direction
	cargo fmt --all --check
	cargo clippy --workspace --all-targets -- -D warnings
	cargo xtask deps

crds: ## write the CustomResourceDefinitions as YAML
	cargo xtask crds

docs: ## write the pages that are made from code and chart: docs/chart.md, the tables of docs/reference.md
	cargo xtask docs

advisories: ## check the dependencies against the RustSec database (needs the internet)
	cargo deny check advisories
