#!/usr/bin/env bash
# Makes the environment, trains a small router with SRPO on the recorded pool, evaluates it on held-out queries and
# prints the table and the path of the accuracy-cost picture.
#
#   bash scripts/quickstart.sh                         the recipe recipes/quickstart/srpo.yaml
#   bash scripts/quickstart.sh --seed 2                the same with a changed line
#   RECIPE=recipes/quickstart/grpo.yaml bash scripts/quickstart.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash scripts/setup.sh

export OMP_WAIT_POLICY=PASSIVE TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}"
export WANDB_MODE="${WANDB_MODE:-offline}"
export PATH="$PWD/.venv/bin:$PATH"

# --quiet: a mistake is one line of the script's, without a traceback of the launcher's.
launch=(accelerate launch --quiet)
if nvidia-smi >/dev/null 2>&1; then
  launch+=(--num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no)
else
  launch+=(--config_file recipes/accelerate/cpu.yaml)
  launch+=(--num_cpu_threads_per_process "$(getconf _NPROCESSORS_ONLN)")
fi

recipe=${RECIPE:-recipes/quickstart/srpo.yaml}
printf '[quickstart] training with %s\n' "$recipe"
# It can be run again: what its last run wrote is taken away, unless it goes on from there.
again=(--overwrite true)
[[ " $* " == *" --resume_from_checkpoint"* ]] && again=()
"${launch[@]}" scripts/train.py --config "$recipe" "${again[@]}" "$@"
printf '[quickstart] finished in %ss, set-up included\n' "$SECONDS"
