# These do all the set-up, where Python 3.11 or newer with venv is there:
#   make serve                            installs, pulls the default model, starts the assistant
#   make ask Q="What is hypertension?"    the same for one answer on the terminal
#   make test                             installs the tools, checks and tests everything

PYTHON ?= python3
BIN := .venv/bin
export override Q := $(value Q) # as typed: a $$ is no variable of make

.PHONY: serve ask test check clean

serve: .venv/use.stamp
	@$(BIN)/attending pull default >/dev/null
	@$(BIN)/attending serve $(ARGS)

ask: .venv/use.stamp
	@test -n "$$Q" || { echo 'usage: make ask Q="What is hypertension?"' >&2; exit 2; }
	@$(BIN)/attending pull default >/dev/null
	@$(BIN)/attending chat -- "$$Q"

test: check
	@$(BIN)/attending pull default >/dev/null || echo "not pulled: the tests that need it will skip" >&2
	@$(BIN)/pytest

check: .venv/dev.stamp
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

clean:
	rm -rf .venv

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; name it: make PYTHON=python3.12 ..." >&2; exit 2; }
	@$(PYTHON) -m venv .venv

.venv/use.stamp: pyproject.toml | .venv/bin/python
	@echo "installing into .venv, once" >&2
	@$(BIN)/pip install --quiet --disable-pip-version-check -e .
	@touch $@

.venv/dev.stamp: pyproject.toml | .venv/bin/python
	@$(BIN)/pip install --quiet --disable-pip-version-check -e '.[train,corpus,dev]'
	@touch $@ .venv/use.stamp
