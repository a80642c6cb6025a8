# What people type. Each target says what it installs; nothing here names a mirror: pip and apt use the machine's own settings.
.DEFAULT_GOAL := help
SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
N ?= 1
UV_COMPILE := $(BIN)/uv pip compile --quiet --system-certs --generate-hashes --no-emit-index-url --custom-compile-command "make lock"
TARGET_PYTHONS := 3.10 3.11 3.12 3.13
export ANSIBLE_CONFIG := $(CURDIR)/ansible.cfg

.PHONY: help setup demo demo-down test lint unit molecule matrix install check harden drift repair lab-up lab-down lab-status hostile bench bench-repair fleet-test collection docs role-docs lock clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: .venv/complete ## the tools of the control side, in .venv

.venv/complete: requirements/control.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=python3.11 ..."; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "apt-get install python3-venv"; apt-get update -qq && apt-get install -qq -y python3-venv; }
	@echo "Installing the control side's tools into .venv (hash-checked; about half a minute) ..."
	@$(PYTHON) -m venv --clear .venv
	@PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/pip install --quiet --require-hashes --requirement requirements/control.lock
	@printf '%s\n' '#!$(CURDIR)/$(BIN)/python' 'import sys; sys.path.insert(0, "$(CURDIR)")' 'from noxctl.cli import main; main()' > $(BIN)/noxctl && chmod +x $(BIN)/noxctl
	@touch $@

demo: setup ## boot a lab host, install Nox on it, use it; it stays until demo-down
	@$(BIN)/python -m lab.demo

demo-down: setup ## end what the demo left running
	@$(BIN)/python -m lab.demo --stop

test: setup ## everything that proves the project
	@$(BIN)/python tests/run.py

lint: setup ## only the linters
	@$(BIN)/python tests/run.py lint

unit: setup ## only the unit tests, of the control side and of the service
	@$(BIN)/python tests/run.py unit

molecule: setup ## only the Molecule scenarios, on lab hosts
	@$(BIN)/python tests/run.py molecule

matrix: setup ## the whole damage matrix: every damage to an installed host, done and mended
	@$(BIN)/python tests/run.py matrix

install: setup ## install Nox on this machine (Ubuntu 22.04 or a relative; root or sudo)
	$(BIN)/ansible-playbook -i inventory/local playbooks/install.yml

check: setup ## what `make install` would change on this machine
	$(BIN)/ansible-playbook -i inventory/local playbooks/install.yml --check --diff

harden: setup ## harden this machine around Nox; what would change: make harden HARDEN=--check
	$(BIN)/ansible-playbook -i inventory/local playbooks/harden.yml $(HARDEN)

drift: setup ## what differs on this machine from what was installed; changes nothing
	$(BIN)/python playbooks/drift.py -i inventory/local

repair: setup ## bring a damaged Nox on this machine back to health
	$(BIN)/ansible-playbook -i inventory/local playbooks/repair.yml

lab-up: setup ## N systemd test hosts on this machine, and inventory/lab: make lab-up N=10
	@$(BIN)/python -m lab up -n $(N)

lab-down: setup ## end them
	@$(BIN)/python -m lab down

lab-status: setup ## list them
	@$(BIN)/python -m lab status

fleet-test: setup ## the scenario fleet with N hosts and all faults: make fleet-test N=30 (PART=tests leaves the faults out)
	@PATH="$(CURDIR)/$(BIN):$$PATH" NOX_FLEET_TESTS="$(or $(PART),.)" NOX_HOSTS="$$(seq -f 'nox%g' -s, $(if $(filter 1,$(N)),4,$(N))),edge1" $(BIN)/molecule test -s fleet; status=$$?; $(BIN)/python -m lab down --lab=m-fleet; exit $$status

lock: setup ## renew the lock files from requirements/*.in
	$(UV_COMPILE) --upgrade --universal --python-version 3.11 requirements/control.in -o requirements/control.lock
	$(UV_COMPILE) --upgrade --universal --python-version 3.11 requirements/docs.in -o requirements/docs.lock
	$(UV_COMPILE) --upgrade --universal --python-version 3.10 requirements/app-test.in -o requirements/app-test.lock
	@set -e; for v in $(TARGET_PYTHONS); do echo "requirements/app-py$$v.lock"; \
	$(UV_COMPILE) --upgrade --python-version $$v --python-platform x86_64-manylinux_2_28 requirements/app.in -o requirements/app-py$$v.lock; done

hostile: setup ## attack a living Nox with the hostile suite: make hostile NOX_URL=https://… NOX_CA=… (token in NOX_TOKEN)
	@$(BIN)/python -m tests.hostile --url "$(NOX_URL)" $(if $(NOX_CA),--ca "$(NOX_CA)") $(if $(NOX_HOST),--host "$(NOX_HOST)")

docs: .venv-docs/complete ## the documentation as pages, in .run/site; dead links are errors
	@NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --quiet --strict
	@echo "to read it: $(PYTHON) -m http.server -d .run/site"

.venv-docs/complete: requirements/docs.lock
	@$(PYTHON) -m venv --clear .venv-docs
	@PIP_DISABLE_PIP_VERSION_CHECK=1 .venv-docs/bin/pip install --quiet --require-hashes --requirement requirements/docs.lock
	@touch $@

role-docs: setup ## the roles' READMEs and docs/variables.md, from the argument specifications
	@$(BIN)/python docs/generate.py

collection: setup ## the archive dist/nox-platform-VERSION.tar.gz, for ansible-galaxy collection install
	$(BIN)/ansible-galaxy collection build --force --output-path dist
bench: setup ## the figures of docs/performance.md, and bench.json: make bench [BENCH="--part memory"]
	@$(BIN)/python -m tests.bench $(BENCH)

bench-repair: setup ## the second table of docs/performance.md: repair and install: make bench-repair [BENCH="--part clean -n 50"]
	@$(BIN)/python -m tests.bench.repair $(BENCH)

clean: ## remove what the targets made in this folder (not the lab's hosts)
	rm -rf .venv .venv-* .run .cache .mypy_cache .ruff_cache .pytest_cache .ansible dist inventory/lab
