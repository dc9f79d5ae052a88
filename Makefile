# make test, make test-fast, make quickstart: each installs into .venv first where that is not done yet.
# Variables: PYTHON, TORCH, TORCH_INDEX, FAIRSEQ, VENV (see scripts/install.py); RAW, TARGETS, UPDATES, SEED, ROUTERS, OUT (quickstart);
# ARGS (test, test-fast, bench).

PYTHON3 ?= python3
VENV ?= .venv
export VENV
FAST = not slow and not sweep and not distributed and not compile

.PHONY: help install test test-fast quickstart bench clean

help:
	@echo 'make test                     run the tests (ARGS="-k gates" and the like are handed to pytest)'
	@echo 'make test-fast                those that take little time, under two minutes on 2 cores'
	@echo 'make quickstart               train, translate with and compare dense, Switch and SparseMixer: 6 minutes on 2 cores'
	@echo 'make quickstart RAW=DIR       the same on the raw text of Multi30k, or with TARGETS=de on English-German;'
	@echo '                              UPDATES=N, SEED=N and ROUTERS="dense ..." change it'
	@echo 'make bench                    an MoE layer beside a dense one, a minute; ARGS="--preset full" and the like are handed on'
	@echo 'make install                  what the others do first: everything into .venv; PYTHON=python3.10, TORCH_INDEX=URL and'
	@echo '                              FAIRSEQ=ve-fairseq choose, and hold until others are given'
	@echo 'make clean                    remove .venv and runs/'

install:
	@$(PYTHON3) scripts/install.py

test: install
	@OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n auto --dist loadfile $(ARGS)

test-fast: install
	@OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n auto --dist loadfile -m "$(FAST)" $(ARGS)

quickstart: install
	@$(VENV)/bin/python -m recipes.quickstart $(if $(RAW),--raw-dir "$(RAW)") $(if $(TARGETS),--targets $(TARGETS)) \
		$(if $(OUT),--out "$(OUT)") \
		$(if $(UPDATES),--updates $(UPDATES)) $(if $(SEED),--seed $(SEED)) $(if $(ROUTERS),--routers $(ROUTERS))

bench: install
	@$(VENV)/bin/python -m benchmarks.layer $(ARGS)

clean:
	rm -rf .venv runs
