# make serve        set everything up and serve the built-in model on 127.0.0.1:8000
# make demo         set everything up, start a server, talk to it through openai-python, print answers and figures
# make test         set everything up, lint, type-check and run every test
# make figures-check  compare the figures in README.md and docs with the result files in docs/figures
# make bench-peers  kvloom beside other servers on this machine, into docs/peers.md. Which ones:
#                     BENCH="--url vllm=http://127.0.0.1:8001 --precision vllm=bf16" for one that runs, or
#                     PEERS_SH=script PEERS=folder for `script vllm|llama folder PORT`, which starts them in turn
PYTHON ?= python3.11
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.kvloom-installed

.PHONY: setup serve demo test lint types figures-check bench-peers clean

setup: $(STAMP)

$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --progress-bar on -e '.[dev]'
	$(BIN)/python -m kvloom.kernels
	touch $@

serve: setup
	$(BIN)/kvloom serve smollm2

demo: setup
	$(BIN)/python -m kvloom.loadtest.demo

test: setup lint types figures-check
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

figures-check: setup
	$(BIN)/python -m kvloom.loadtest.figures

bench-peers: setup
	$(BIN)/kvloom bench peers --publish docs/figures/peers.json --plot docs/peers.png $(BENCH) \
	  --also 'kvloom-bf16=--weights bf16' --precision kvloom-bf16=bf16 \
	  $(if $(PEERS_SH),--start 'vllm=bash $(PEERS_SH) vllm $(PEERS) {port}' --precision vllm=bf16 \
	    --start 'llama=bash $(PEERS_SH) llama $(PEERS) {port}' --precision llama=Q4_1)
	$(BIN)/python -m kvloom.loadtest.figures --write

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache
