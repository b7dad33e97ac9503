#!/usr/bin/env bash
# Makes the environment, then runs the linter, the type checker and the tests.
#
#   bash scripts/test.sh                  everything that runs in minutes on two CPU cores
#   bash scripts/test.sh --all            the slow tests too
#   bash scripts/test.sh --newest         generation, rollout, replay, trainer and agent tests in a second environment
#                                         (.venv-newest) with the newest versions that pyproject.toml allows
#   bash scripts/test.sh --oldest         the same with the oldest (.venv-oldest)
#   bash scripts/test.sh --vllm           the tests on a live vLLM, in .venv-vllm, on a machine without a GPU too
#   bash scripts/test.sh tests/srpo/test_x.py  these tests only; further words go to pytest
#
# Tests marked gpu are skipped without an NVIDIA GPU; tests marked network are never run from here.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { printf '[test] %s\n' "$*"; }

selection="not slow and not network"
versions=""
case ${1:-} in
  --all) selection="not network"; shift ;;
  --newest | --oldest) versions=$1; shift ;;
  --vllm) selection="vllm"; live=1; shift ;;
esac

bash scripts/setup.sh ${live:+--vllm} $versions

# Many small processes on few cores: idle OpenMP threads must sleep, not spin (a tiny step takes 5 times as long).
export OMP_WAIT_POLICY=PASSIVE OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
export HF_HUB_OFFLINE=1 WANDB_MODE=offline HF_HUB_DISABLE_TELEMETRY=1
export PATH="$PWD/.venv${versions:+-${versions#--}}/bin:$PATH"

if [[ -n ${live:-} ]]; then
  export PATH="$PWD/.venv-vllm/bin:$PATH" PYTEST_WORKERS=0  # one engine at a time
  (($#)) || set -- tests/srpo/test_vllm_live.py tests/srpo/test_vllm_server.py tests/routers/test_live_vllm.py
elif [[ -n $versions ]]; then
  # What touches other packages' seams: caches, hooks, adapters, engines. The rest runs on the lock only.
  (($#)) || set -- tests/*/test_{generate,kv_cache,rollout,episodes,replay,replay_trainer,replay_turns,minirl,routed_experts}.py \
    tests/*/test_{trl_hooks,trainer_parity,trainer_bopo,trainer_arguments,teacher,heads,agent,step_router,versions}.py \
    tests/*/test_{positions,reference,precision,train_mode,sampling_rules}.py
elif (($# == 0)); then
  say "ruff"
  ruff check .
  say "mypy"
  mypy
fi

say "pytest -m \"$selection\""
python -m pytest -n "${PYTEST_WORKERS:-2}" --dist loadfile -m "$selection" --durations 15 "$@"
say "green after ${SECONDS}s"
