# `make` without a target lists the commands.
PYTHON_IN := .venv/bin/python
export PATH := $(CURDIR)/.venv/bin:$(PATH)
QUIET := PREFECT_SERVER_ANALYTICS_ENABLED=false DO_NOT_TRACK=1 MLFLOW_DISABLE_TELEMETRY=true \
	MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false DVC_NO_ANALYTICS=1 GX_ANALYTICS_ENABLED=false
# A command that takes make's place in its shell gets the signals that make passes on.
RUN = exec env $(QUIET) $(PYTHON_IN)
PORT ?= 5000
PREFECT_PORT ?= 4200

.DEFAULT_GOAL := help
.PHONY: help setup workspace demo demo-real retrain serve chat label serve-model up down status test test-fast test-slow lint ui bench calibrate tune study studies worker docs clean

help:  ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup:  ## install into .venv, once: 10 s to 5 min by network; 3 GB, more with CUDA
	@infra/setup.sh

workspace: setup
	@test -d .dvc || { echo "error: no .dvc folder here; restore it with: git checkout .dvc .dvcignore" >&2; exit 2; }
	@git rev-parse --git-dir >/dev/null 2>&1 || test -f .dvc/config.local || $(PYTHON_IN) -m dvc config --local core.no_scm true

demo: workspace  ## train, align, compare on built-in data: 7 min (SEEDS=5 PANEL=reward_model)
	@$(RUN) -m flows.compare $(if $(SEEDS),--seeds $(SEEDS)) $(if $(PANEL),--panel $(PANEL))

demo-real: workspace  ## the same with a language model of 135 M parameters: docs/real-model.md
	@infra/models/smollm2.sh
	@$(PYTHON_IN) -m pipelines.commands.configure examples/smollm2.yaml
	@$(RUN) -m flows.compare

retrain: workspace  ## take in new files, train, promote a proven gain; seconds if nothing is new
	@$(RUN) -m flows.retrain

serve: workspace  ## retrain nightly, compare weekly, with Prefect's UI (PREFECT_PORT=4200)
	@$(RUN) -m flows.serve --port $(PREFECT_PORT)

chat: workspace  ## talk to a model in the terminal (MODEL=champion ARGS="--against challenger")
	@$(RUN) -m pipelines.commands chat $(MODEL) $(ARGS)

label: workspace  ## let people compare answers on a page, to train on (ARGS="champion challenger")
	@$(RUN) -m pipelines.commands label $(ARGS)

serve-model: workspace  ## serve the champion, OpenAI-compatible (ARGS="champion dpo-0 --port 8000")
	@$(RUN) -m pipelines.commands serve $(ARGS)

up: workspace  ## start PostgreSQL, S3, MLflow, Prefect and a worker, which run until make down
	@$(RUN) -m infra.servers up

down: setup  ## stop them; databases and logs are kept
	@$(RUN) -m infra.servers down

status: setup  ## show which of them run, and their addresses
	@$(RUN) -m infra.servers status

test: setup  ## run all tests but the slow ones
	@$(RUN) -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder $(ARGS)

FAST := tests/algorithms tests/data tests/environments tests/objectives tests/pipelines/config tests/test_files.py

test-fast: setup  ## the tests of the mathematics, data and parameters, for the inner loop
	@$(RUN) -m pytest $(FAST) $(ARGS)

test-slow: setup  ## the tests marked slow
	@$(RUN) -m pytest -m slow $(ARGS)

lint: setup  ## check formatting, lint, types, and the dependencies for known vulnerabilities
	@$(PYTHON_IN) -m ruff format --check .
	@$(PYTHON_IN) -m ruff check .
	@$(PYTHON_IN) -m pyrefly check --output-format min-text
	@infra/audit.sh

ui: setup  ## open MLflow for the runs and Prefect for the flows (PORT=5000 PREFECT_PORT=4200)
	@$(RUN) -m pipelines.commands.ui --port $(PORT) --prefect-port $(PREFECT_PORT)

bench: setup  ## repeat all measurements and write benchmarks/RESULTS.md: an hour on two idle cores
	@test -x .venv-trl/bin/python || benchmarks/peers/setup.sh trl
	@for name in training limits async_grpo rollouts logprobs scaling journal orchestration plan_memory; do \
		echo "== benchmarks/$$name.py"; $(QUIET) $(PYTHON_IN) "benchmarks/$$name.py" --write || exit 1; done
	@$(PYTHON_IN) benchmarks/results.py

calibrate: workspace  ## compare copies of one algorithm: how often are they called different?
	@$(RUN) -m pipelines.commands.calibrate $(ARGS)

tune: workspace  ## tune all algorithms with equal trials; chosen on some prompts, reported on others
	@$(RUN) -m flows.tune $(ARGS)

study: workspace  ## run one study of examples/studies and decide its claims (NAME=group_size)
	@$(RUN) -m flows.study $(NAME) $(ARGS)

studies: workspace  ## run all studies and write docs/claims.md
	@$(RUN) -m flows.study --all $(ARGS)

worker: workspace  ## run stages for flows on other machines (POOL=stages; ARGS="list" or "drain NAME")
	@$(RUN) -m flows.workers $(or $(ARGS),add) $(if $(POOL),--pool $(POOL))

docs: setup  ## build the documentation into .posttrain/site, offline
	@NO_MKDOCS_2_WARNING=true $(PYTHON_IN) -m mkdocs build --strict --quiet

clean:  ## remove caches and logs; keeps data, models, runs, report and MLflow's database
	@rm -rf .pytest_cache .ruff_cache .hypothesis .posttrain/logs
	@find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
