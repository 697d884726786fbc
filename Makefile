# Every target makes its own virtual environment first; all are idempotent.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export OMP_WAIT_POLICY = PASSIVE

.PHONY: help demo test lint docs bench clean

help:  ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

# A CPU build of torch is enough for the demo and the tests. Asking for it by its exact version first keeps pip
# from a multi-gigabyte CUDA build on machines that have the CPU wheel at hand; users with a GPU set TORCH=.
TORCH ?= torch==2.13.0

$(BIN)/thalweg: pyproject.toml setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(if $(TORCH),$(BIN)/pip install -q '$(TORCH)')
	$(BIN)/pip install -q -e '.[dev]'
	mkdir -p .typing/thalweg
	for folder in apps diffusion pde core_optim checkpoints configs; do ln -sfn ../../$$folder .typing/thalweg/$$folder; done
	touch $@

demo: $(BIN)/thalweg  ## generate data, pretrain, fine-tune, compare, report: runs/demo/report.html
	$(BIN)/thalweg demo

lint: $(BIN)/thalweg  ## ruff, import layers, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy -p thalweg.core_optim -p thalweg.checkpoints -p thalweg.apps

test: lint  ## lint, then the default tests
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2

$(BIN)/mkdocs: $(BIN)/thalweg
	$(BIN)/pip install -q -e '.[docs]'
	touch $@

docs: $(BIN)/mkdocs  ## build the documentation: site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: $(BIN)/thalweg  ## print every figure quoted in the documentation
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/poseidon_agreement.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/poseidon_model.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/pde_loader.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/pde_solvers.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/diffusion_scheduler.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/optim_step.py $(if $(PEERS),--peers $(PEERS))
	OMP_NUM_THREADS=1 $(BIN)/thalweg bench optim --budget 10
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/zeroth_order.py --tokens 1024
	test -z "$(THALWEG_ORACLES)" || OMP_NUM_THREADS=1 $(BIN)/python benchmarks/s3_refine.py --nfe 5 --iterations 200
	test -z "$(THALWEG_ORACLES)" || OMP_NUM_THREADS=1 $(BIN)/python benchmarks/s3_search.py $(THALWEG_ORACLES)/s3 --nfe 5
	test -z "$(THALWEG_ORACLES)" || OMP_NUM_THREADS=1 $(BIN)/python benchmarks/s3_predictor.py $(THALWEG_ORACLES)/s3 --seed 0
	test ! -d runs/demo/digits || OMP_NUM_THREADS=1 $(BIN)/python benchmarks/s3_images.py runs/demo/digits \
		runs/demo/search --nfe 5 --samples 100 --seeds 0

clean:  ## remove what the targets made, runs and data excepted
	rm -rf $(VENV) .typing build dist site *.egg-info
