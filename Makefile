# Each of demo, test and lint works as the first command on a machine with Python >= 3.11 and make:
# it makes .venv if there is none, and installs what it needs there.

# The interpreter to make .venv with: a version (3.13), a name (python3.13) or a path.
# Empty: python3 if it is new enough, else the newest one found. Ignored once .venv is there.
PYTHON ?=
VENV ?= .venv

# The arguments of examples/nanogpt.py, for example: make demo DEMO_ARGS=--resume
DEMO_ARGS ?= --overwrite
# More arguments for pytest, for example: make test PYTEST_ARGS="-m slow -k sharding"
PYTEST_ARGS ?=
# scion.py of the authors' PyTorch code, for make bench to compare with. PyTorch has to be in VENV.
REFERENCE ?=
# The folder or module that make mutants changes, and pytest's arguments for each change: all tests
# take minutes. make mutants MUTANTS=scion_jax/norms MUTANTS_TESTS="scion_jax/norms tests/norms"
MUTANTS ?= scion_jax
MUTANTS_TESTS ?=
# Test processes. The default is one per core, and at most 8.
TEST_JOBS ?= auto
# Each has a part of the files until it is done with them, since neighbours share what they compile.
jobs = --numprocesses=$(TEST_JOBS) --maxprocesses=8 --dist=worksteal

python := $(VENV)/bin/python

# install GROUPS: the library, editable, with some of pyproject.toml's dependency groups, which pip
# knows from 25.1 on. Not compiled beforehand, which takes longer than all the rest: Python compiles
# what is imported.
define install
	@echo "Installing scion_jax with $(1) into $(VENV) (the first time takes a minute or two)"
	@$(python) -m pip --version >/dev/null 2>&1 || $(python) -m ensurepip >/dev/null
	@$(pip) "pip>=25.1"
	@$(pip) --editable . $(addprefix --group ,$(1))
endef
pip := $(python) -m pip install --quiet --no-compile --disable-pip-version-check

.PHONY: help demo test test-slow coverage mutants lint bench docs release-check clean
.NOTPARALLEL:

help:
	@echo "make demo           train a small GPT on text that this machine has (2 minutes)"
	@echo "make test           run the tests but the slow ones; those: make test-slow"
	@echo "make coverage       run them and list the lines of the library that none runs"
	@echo "make mutants        change the library in small places: do the tests notice? (hours)"
	@echo "make lint           ruff check, ruff format --check, pyright"
	@echo "make bench          measure time, memory and accuracy; see benchmarks/README.md"
	@echo "make docs           build the documentation into out/docs"
	@echo "make release-check  build what would be released, install it and try it"
	@echo "make clean          remove the virtual environments, caches and build outputs"
	@echo
	@echo "PYTHON=3.12 (or a name, or a path) chooses the interpreter that .venv is made with."

demo: $(VENV)/.installed-examples
	@$(python) examples/nanogpt.py $(DEMO_ARGS)

test: $(VENV)/.installed-test
	@$(python) -m pytest $(jobs) $(PYTEST_ARGS)

# The tests left out of `test`; .ci/nightly runs them.
test-slow: $(VENV)/.installed-test
	@$(python) -m pytest -m slow $(jobs) $(PYTEST_ARGS)

# sysmon costs next to nothing; Python has it from 3.12 on.
coverage: $(VENV)/.installed-coverage
	@COVERAGE_CORE=sysmon $(python) -m pytest $(jobs) --cov --no-cov-on-fail $(PYTEST_ARGS)

# Changes files where they are, so commit before. An interrupted run goes on: delete out/mutants to
# start anew.
session := out/mutants/$(subst /,-,$(MUTANTS)).sqlite
mutants: export PATH := $(abspath $(VENV)/bin):$(PATH)
mutants: export PYTEST_ADDOPTS := $(MUTANTS_TESTS)
mutants: export JAX_COMPILATION_CACHE_DIR := $(CURDIR)/out/mutants/compiled
mutants: $(VENV)/.installed-mutation
	@mkdir -p out/mutants
	@sed 's|^module-path.*|module-path = "$(MUTANTS)"|' .ci/cosmic-ray.toml > out/mutants/settings.toml
	@cosmic-ray --verbosity ERROR baseline out/mutants/settings.toml
	@test -f $(session) || { cosmic-ray init out/mutants/settings.toml $(session) && \
		cr-filter-operators $(session) out/mutants/settings.toml; }
	@cosmic-ray exec out/mutants/settings.toml $(session)
	@cr-report --surviving-only --show-diff $(session)

lint: $(VENV)/.installed-dev
	@echo "ruff check"
	@$(python) -m ruff check .
	@echo "ruff format --check"
	@$(python) -m ruff format --check .
	@echo "pyright"
	@PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(python) -m pyright --pythonpath $(python)

results := out/benchmarks

bench: $(VENV)/.installed-examples
	@$(python) -m benchmarks.step_time --json $(results)/step_time.json \
		$(if $(REFERENCE),--reference "$(REFERENCE)")
	@$(python) -m benchmarks.compile_time --json $(results)/compile_time.json
	@$(python) -m benchmarks.memory --json $(results)/memory.json
	@$(python) -m benchmarks.momentum_matrices $(results)/momentum.npz
	@$(python) -m benchmarks.orthogonalization --matrices $(results)/momentum.npz \
		--json $(results)/orthogonalization.json

# Leaves what can be uploaded in dist/.
release-check: $(VENV)/.installed-release
	@.ci/release-check $(abspath $(python))

# NO_MKDOCS_2_WARNING silences Material's advertisement of its successor.
docs: $(VENV)/.installed-docs
	@NO_MKDOCS_2_WARNING=1 $(python) -m mkdocs build --quiet --strict --config-file docs/mkdocs.yml
	@echo "out/docs/index.html"

# Remade when an interrupted run left no interpreter, or one whose target is gone.
$(python):
	@interpreter=$$(.ci/find-python "$(PYTHON)") && \
	echo "Making $(VENV) with $$interpreter" && \
	rm -f "$(VENV)"/bin/python* && \
	"$$interpreter" -m venv "$(VENV)"

# Stamps. A group that contains others settles these, too.
# They say nothing once the interpreter is gone.
stamps := $(addprefix $(VENV)/.installed-,examples test dev compiled coverage mutation docs release ci)
ifneq ($(shell test -x $(python) && echo yes),yes)
.PHONY: $(stamps)
endif

$(VENV)/.installed-examples: pyproject.toml | $(python)
	$(call install,examples)
	@touch $@

$(VENV)/.installed-test: pyproject.toml | $(python)
	$(call install,test)
	@touch $(VENV)/.installed-examples $@

# The tests, and the TPU's compiler for benchmarks/compiled.py and its test.
$(VENV)/.installed-compiled: pyproject.toml | $(python)
	$(call install,test compiled)
	@touch $(VENV)/.installed-examples $(VENV)/.installed-test $@

$(VENV)/.installed-coverage: pyproject.toml | $(python)
	$(call install,coverage)
	@touch $(VENV)/.installed-examples $(VENV)/.installed-test $@

$(VENV)/.installed-mutation: pyproject.toml | $(python)
	$(call install,mutation)
	@touch $(VENV)/.installed-examples $(VENV)/.installed-test $@

$(VENV)/.installed-docs: pyproject.toml | $(python)
	$(call install,docs)
	@touch $@

$(VENV)/.installed-release: pyproject.toml | $(python)
	$(call install,release)
	@touch $@

$(VENV)/.installed-dev: pyproject.toml | $(python)
	$(call install,dev)
	@touch $(VENV)/.installed-examples $(VENV)/.installed-test $@

# What .ci/run needs on the newest Python, at once.
$(VENV)/.installed-ci: pyproject.toml | $(python)
	$(call install,dev compiled)
	@touch $(addprefix $(VENV)/.installed-,examples test dev compiled) $@

clean:
	@rm -rf .venv .venv-* build dist .pytest_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
