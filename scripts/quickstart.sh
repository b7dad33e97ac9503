#!/usr/bin/env bash
# Makes the environment, trains a small router with SRPO on the recorded pool, evaluates it on held-out queries and
# prints the table and the path of the accuracy-cost picture.
#
#   bash scripts/quickstart.sh                         the recipe quickstart/srpo
#   bash scripts/quickstart.sh --seed 2                the same with a changed line
#   RECIPE=quickstart/grpo bash scripts/quickstart.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash scripts/setup.sh

export OMP_WAIT_POLICY=PASSIVE TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}"
export WANDB_MODE="${WANDB_MODE:-offline}"
export PATH="$PWD/.venv/bin:$PATH"

nvidia-smi >/dev/null 2>&1 || export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(getconf _NPROCESSORS_ONLN)}"

recipe=${RECIPE:-quickstart/srpo}
printf '[quickstart] training with %s\n' "$recipe"
# It can be run again: what its last run wrote is taken away, unless it goes on from there.
again=(--overwrite true)
[[ " $* " == *" --resume_from_checkpoint"* ]] && again=()
srpo train "$recipe" "${again[@]}" "$@"
printf '[quickstart] finished in %ss, set-up included\n' "$SECONDS"
