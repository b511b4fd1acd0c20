# Everything runs in .venv, installed against constraints.txt. Needs Python 3.10 or later, pip and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=
# two workers; the tests that start processes stay on one of them
TWO := -n 2 --dist loadscope --no-loadscope-reorder

.PHONY: help pretrain test test-distributed mutate lint docs chaos clean

help:
	@echo "make pretrain           train a small LLaMA with GaLore (runs/quickstart); ARGS='--key value ...' changes it"
	@echo "make test               the test suite"
	@echo "make test-distributed   every optimizer in every layout, each pair of options, as a table; and what make test leaves out"
	@echo "make mutate             break the code, one line at a time, and see the tests go red; ARGS='--only TEXT' for some"
	@echo "make lint               ruff and mypy"
	@echo "make docs               the documentation (build/docs), warnings as errors; needs Python 3.11"
	@echo "make chaos              runs with faults at random moments, which must end as undisturbed ones; ARGS='--faults N --seed N'"

pretrain: $(VENV)/.run
	$(BIN)/gracile pretrain $(ARGS)

test: $(VENV)/.dev
	$(BIN)/python -m pytest $(TWO) $(ARGS)

test-distributed: $(VENV)/.dev
	$(BIN)/python -m pytest $(TWO) -m thorough
	$(BIN)/python tests/distributed/matrix.py $(ARGS)

mutate: $(VENV)/.dev
	$(BIN)/python tests/mutations/run.py $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@# mypy must find the root package under its name, whatever the checkout's folder is called
	@link=$$(mktemp -d) && ln -s "$(CURDIR)" $$link/gracile && MYPYPATH=$$link $(BIN)/mypy -p gracile; \
	status=$$?; rm -r $$link; exit $$status

docs: $(VENV)/.docs
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs build/docs
	@echo "build/docs/index.html"

chaos: $(VENV)/.dev
	PYTHONPATH=tests $(BIN)/python -m chaos.run $(ARGS)

# torch first: what follows then finds it and looks no further
$(VENV)/.torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --disable-pip-version-check --quiet torch -c constraints.txt
	touch $@

$(VENV)/.run: $(VENV)/.torch setup.cfg pyproject.toml
	$(BIN)/pip install --disable-pip-version-check --quiet -e . -c constraints.txt
	touch $@

$(VENV)/.dev: $(VENV)/.run
	$(BIN)/pip install --disable-pip-version-check --quiet -e '.[dev]' -c constraints.txt
	touch $@

$(VENV)/.docs: $(VENV)/.run
	$(BIN)/pip install --disable-pip-version-check --quiet -e '.[docs]' -c constraints.txt
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
