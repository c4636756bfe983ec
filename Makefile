# make figures | test | lab | clean. Each installs what it needs and can be run again.
PYTHON ?= python3
CONFIG ?=
ABLATIONS ?=
UV := uv==0.13.9
BIN := .venv/bin
# The environment is reinstalled when its requirements change, whatever the files' dates.
STAMP := .venv/installed-$(shell cat requirements.txt pyproject.toml | cksum | cut -d ' ' -f 1)
NOTEBOOKS := $(wildcard notebooks/*.ipynb)
export UV_HTTP_TIMEOUT ?= 300

.PHONY: help figures test lint smoke lab environment clean
help:
	@echo "make figures   data, training, all notebooks, one page under data/runs/"
	@echo "make test      lint code and notebooks, run the tests"
	@echo "make lab       JupyterLab on 127.0.0.1, with its token"
	@echo "make clean     remove the phantom and caches; data/runs (trained models), figures/ and .venv stay"

figures: $(STAMP)
	@$(BIN)/python -m dreamer.pipeline figures $(CONFIG) $(if $(ABLATIONS),ablations=$(ABLATIONS))

test: lint
	@echo "== tests"
	@$(BIN)/python -m pytest -n 2 --dist loadscope

lint: $(STAMP)
	@echo "== lint: code and notebooks"
	@$(BIN)/ruff check .
	@$(if $(NOTEBOOKS),$(BIN)/nbstripout --verify --keep-id $(NOTEBOOKS))

lab: $(STAMP)
	@echo "== JupyterLab on 127.0.0.1; the address below has its token"
	@$(BIN)/jupyter lab --ServerApp.ip=127.0.0.1 $(if $(filter 0,$(shell id -u)),--allow-root)

environment: $(STAMP)

# An interrupted installation leaves the mark .venv/installing and starts from nothing next time.
$(STAMP): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if (3, 11) <= v < (3, 14) else \
	  "Python 3.11 to 3.13 is needed, %s is %d.%d; choose one: make test PYTHON=python3.12" \
	  % (sys.executable, *v[:2]))'
	@echo "== environment: .venv from requirements.txt (once; about 6 GB on disk, a few minutes)"
	@test ! -e .venv/installing || rm -rf .venv
	@rm -f .venv/installed-*
	@mkdir -p .venv && touch .venv/installing && $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(UV)
	@$(BIN)/uv pip install --python $(BIN)/python --quiet --compile-bytecode -r requirements.txt
	@$(BIN)/uv pip install --python $(BIN)/python --quiet --no-deps -e .
	@touch $@ && rm .venv/installing

clean:
	rm -rf data/phantom data/cache .snakemake .pytest_cache .ruff_cache
