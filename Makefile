# Two commands on a fresh machine: `make demo` and `make test`. Needs make and Python >= 3.11, nothing else.
# The virtual environment is made on first use and brought up to date when pyproject.toml or constraints.txt change.

VENV ?= .venv
JOBS ?= 2
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
SETUP := pyproject.toml constraints.txt

.PHONY: help demo test slow lint types imports pytest format docs mutants bench gpu reliability attacks clean

help:
	@echo "make demo     compare four methods on real text, with a report (about five minutes after installation)"
	@echo "make test     lint, types, import rules and tests"
	@echo "make slow     the slower tests: over real processes, and every variant of what the quick ones sample"
	@echo "make lint     ruff and its formatter, without changing anything"
	@echo "make format   let ruff mend what it can"
	@echo "make docs     write docs/recipes.md from the types"
	@echo "make mutants  plant known bugs one by one; every one must be found"
	@echo "make bench    speed beside plain PyTorch + PEFT, on the same work"
	@echo "make gpu      device tests, speed and memory of one GPU, in under ten minutes"
	@echo "make reliability  kills, damage, hostile messages and an hour's run, counted (two hours; PARTS=... for some)"
	@echo "make attacks  what attackers do to each method under each defence (TEXTS=file.parquet)"
	@echo "make clean    remove the virtual environment and the caches"

demo: $(VENV)/.installed-demo
	$(BIN)/fedlora demo

test: lint types imports pytest

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-dev
	$(BIN)/mypy

imports: $(VENV)/.installed-dev
	$(BIN)/lint-imports

# One torch thread a process: two processes of one thread each are faster than two that fight over the cores.
pytest: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal -m "not slow" --durations=20 --durations-min=10

# Real processes, Flower's own commands, and every variant of what the quick tests sample: an hour or more.
slow: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal -m slow

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.installed-dev
	$(BIN)/python docs/build.py

mutants: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python tests/mutants.py -j $(JOBS)

bench: $(VENV)/.installed-demo
	$(BIN)/fedlora bench

# pip brings a build of PyTorch for the GPU where one is offered; a Python that has one already is used with VENV=.
gpu: $(VENV)/.installed-dev
	$(BIN)/python bench/gpu.py

# PARTS: kills events damage fuzz soak connections; by default those whose results are not there yet.
reliability: $(VENV)/.installed-dev
	$(BIN)/python bench/reliability.py $(PARTS)

# TEXTS: a Parquet file with the columns text and label, such as 20 Newsgroups.
attacks: $(VENV)/.installed-demo
	$(BIN)/python bench/attacks.py $(TEXTS)

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .import_linter_cache build dist

# A Python that is new enough and can make environments. Each candidate is run: a name on the PATH may be a mere shim.
define make_venv
if ! $(BIN)/python -c 'import pip, sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then \
	found=; \
	for p in $(PYTHON) python3.13 python3.12 python3.11 python3; do \
		if "$$p" -c 'import ensurepip, venv, sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then \
			found=$$p; break; \
		fi; \
	done; \
	if [ -z "$$found" ]; then \
		echo "fedlora needs Python 3.11 or newer with its venv module; python3 here is: $$(python3 --version 2>/dev/null || echo missing)" >&2; \
		echo "Install one (Debian, Ubuntu: apt install python3 python3-venv; macOS: brew install python@3.12)" >&2; \
		echo "or name one: make $(MAKECMDGOALS) PYTHON=/path/to/python3" >&2; \
		exit 1; \
	fi; \
	echo "making $(VENV) with $$found ($$("$$found" --version))"; \
	"$$found" -m venv --clear $(VENV); \
fi
endef

$(VENV)/.installed-demo: $(SETUP)
	@$(make_venv)
	$(PIP) install -c constraints.txt -e '.[demo,report]'
	@touch $@

$(VENV)/.installed-dev: $(SETUP)
	@$(make_venv)
	$(PIP) install -c constraints.txt -e '.[dev]'
	@touch $@ $(VENV)/.installed-demo
