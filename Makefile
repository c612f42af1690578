# `make run` and `make test` set up all they need on a fresh machine with Python 3.11+.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.requirements-$(shell cat requirements.txt requirements-dev.txt | cksum | cut -d' ' -f1)

.PHONY: run test setup notebook corpus bench clean

run: $(STAMP)
	$(BIN)/python train_arciva_assistant_local.py --base_model nano

test: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -n 2 --dist loadfile

setup: $(STAMP)

$(STAMP): requirements.txt requirements-dev.txt
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-dev.txt
	rm -f $(VENV)/.requirements-*
	touch $@

notebook: $(STAMP)  ## execute the notebook top to bottom, stamp it and export the module
	CUDA_VISIBLE_DEVICES= $(BIN)/python tools/execute_notebook.py  # the committed outputs are the nano base's on any machine

corpus: $(STAMP)  ## rebuild both data files from data/knowledge
	$(BIN)/python tools/build_corpus.py

bench: $(STAMP)  ## every benchmark that needs no GPU, on an idle machine; benchmarks/README.md has the results
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-bench.txt
	$(BIN)/python benchmarks/train_cpu.py
	$(BIN)/python benchmarks/train_cpu.py --sweep --repeats 1
	$(BIN)/python benchmarks/train_gpu.py --shape tiny --quick --compile
	$(BIN)/python benchmarks/generate.py
	$(BIN)/python benchmarks/merge.py
	$(BIN)/python benchmarks/merge.py --bases
	$(BIN)/python benchmarks/data.py
	$(BIN)/python benchmarks/first_step.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/leak.py

clean:
	rm -rf model_output final_merged_model reports checkpoints downloads
