# An index of one-liners. `make` lists them.
.PHONY: help install test compile lint types bench gpu peers profile growth scaling crossover soak demo-model stage ci

help:         ## this list
	@grep -E '^[a-z-]+: .*##' Makefile | sed 's/: *##/\t/' | expand -t 14

install:      ## the package with everything for development, editable
	pip install -e ".[dev,interop]"

test:         ## all tests; kernels run in Triton's interpreter where there is no GPU
	pytest -n 2 --dist loadfile

compile:      ## every kernel compiled and interpreted by another Triton: make compile TRITON=3.6.0
	pip install --quiet --no-deps --upgrade --target .triton triton==$(or $(TRITON),$(error expected a version of Triton, got none; make compile TRITON=3.6.0))
	FASTSAE_TRITON=.triton pytest tests/test_compile.py
	PYTHONPATH=.triton:$$PYTHONPATH pytest tests/test_keys.py tests/test_select.py tests/test_encode.py tests/test_decode.py \
		tests/test_by_latent.py tests/test_latent_grad.py tests/test_autograd.py tests/test_recompile.py

lint:         ## style and format
	ruff check . && ruff format --check .

types:        ## type checks
	pyright

bench:        ## speed on this machine, beside plain torch
	fastsae bench

gpu:          ## tests compiled, then the benchmark: make gpu OUT=folder [BENCH="--shapes S1"]
	benchmarks/gpu.sh $(or $(OUT),$(error expected a folder for the results, got none; make gpu OUT=folder)) $(BENCH)

peers:        ## a step beside sparsify, SAELens and dictionary_learning, and quality (benchmarks/peers/requirements.txt first)
	python benchmarks/peers/run.py $(PEERS) && python benchmarks/peers/quality.py

profile:      ## where the time of `fastsae train` goes
	python benchmarks/profile_training.py

growth:       ## time and memory per doubling of tokens and of latents
	python benchmarks/growth.py

scaling:      ## training on one and two processes, by mode; SCALING="--json FILE --write README.md" makes README's tables
	python benchmarks/scaling.py $(SCALING)

soak:         ## runs on four processes, killed and resumed for half an hour: make soak [MINUTES=30]
	python benchmarks/soak.py --minutes $(or $(MINUTES),30) --ranks 4

crossover:    ## gathered rows against dense products, by latents per active one
	python benchmarks/crossover.py

demo-model:   ## train the embedded model anew
	python -m fastsae.demo.build

stage:        ## the kernels as a Hugging Face kernel repository: make stage OUT=folder
	python kernels/stage.py $(or $(OUT),$(error expected a folder for the repository, got none; make stage OUT=folder))

ci:           ## what CI runs, from fresh virtual environments
	.ci/run
