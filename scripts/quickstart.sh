#!/usr/bin/env bash
# Makes the environment, trains a small router on the recorded pool, evaluates it on held-out queries and
# prints the table and the path of the accuracy-cost picture.
#
#   bash scripts/quickstart.sh                         the recipe quickstart/router
#   bash scripts/quickstart.sh --seed 2                the same with a changed line
#   RECIPE=quickstart/srpo bash scripts/quickstart.sh     another shipped recipe, or a file
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash scripts/setup.sh

export OMP_WAIT_POLICY=PASSIVE TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}"
recipe=${RECIPE:-quickstart/router}
printf '[quickstart] training with %s\n' "$recipe"
# It can be run again: what its last run wrote is taken away, unless it goes on from there.
again=(--overwrite true)
[[ " $* " == *" --resume_from_checkpoint"* ]] && again=()
.venv/bin/python -m srpo train "$recipe" "${again[@]}" "$@"
printf '[quickstart] finished in %ss, set-up included\n' "$SECONDS"
