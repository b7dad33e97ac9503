"""Who may import whom, what no file may call, and that the pure parts import without TRL."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("srpo", "routers", "rewards")
# Package -> modules of the other packages that it may import.
_COMMON = "cli garbage losses quarantine ranges redact strict_yaml texts types"
COMMON = {f"srpo.{name}" for name in _COMMON.split()}
ALLOWED: dict[str, set[str]] = {"srpo": set(), "routers": COMMON | {"srpo.rollout"}, "rewards": COMMON}
# routers.tasks is the one place where the three meet. `srpo.cli.COMMANDS` names modules of routers as texts: a command
# is found by its name as a task is by its entry point, and nothing is imported before it is asked for.
EXCEPTIONS: dict[str, set[str]] = {"routers.tasks": {"srpo", "rewards"}}
LIBRARY = tuple(
    f"routers.{name}." for name in "data pool language environments baselines evaluation quickstart".split()
)
"""Parts of routers that know no task."""

FORBIDDEN_NAMES = {"eval", "exec"}
FORBIDDEN_MODULES = {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
# What is sent to a child of the same run, over a pipe, and never written.
SENT = {"srpo/run/apart.py": "cloudpickle"}
FORBIDDEN_CALLS = {
    "torch.load": "reads pickles; use safetensors",
    "torch.save": "writes pickles; use safetensors",
    "yaml.load": "makes arbitrary objects; use yaml.safe_load",
    "yaml.unsafe_load": "makes arbitrary objects; use yaml.safe_load",
    "yaml.full_load": "makes objects; use yaml.safe_load",
    "os.system": "runs a shell",
    "os.popen": "runs a shell",
    "subprocess.getoutput": "runs a shell",
}
FORBIDDEN_KEYWORDS = {"shell", "trust_remote_code"}  # with the value True


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def imports(tree: ast.AST, module: str, is_package: bool) -> Iterator[tuple[str, int]]:
    """Absolute dotted names that a module imports, `from a import b` as a.b, with line numbers."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                parent = parts[: len(parts) - node.level + is_package]
                base = ".".join([*parent, *([node.module] if node.module else [])])
            yield from ((f"{base}.{alias.name}", node.lineno) for alias in node.names)


def foreign_imports(text: str, module: str, is_package: bool = False) -> list[str]:
    own = module.split(".")[0]
    found = []
    for name, line in imports(ast.parse(text), module, is_package):
        more = [names for part, names in EXCEPTIONS.items() if f"{module}.".startswith(f"{part}.")]
        allowed = ALLOWED[own].union(*more)
        permitted = any(name == other or name.startswith(other + ".") for other in allowed)
        if name.split(".")[0] in set(PACKAGES) - {own} and not permitted:
            found.append(f"line {line}: {name}")
        to_task = name.startswith("routers.tasks.")
        another = module.startswith("routers.tasks.") and module.split(".")[:3] != name.split(".")[:3]
        if to_task and (f"{module}.".startswith(LIBRARY) or another):
            found.append(f"line {line}: {name}")
        if name.split(".")[0] == "scripts":
            found.append(f"line {line}: {name}")
    return found


@pytest.mark.parametrize("path", sources(*PACKAGES), ids=lambda path: str(path.relative_to(ROOT)))
def test_the_direction_of_imports(path: Path) -> None:
    relative = path.relative_to(ROOT).with_suffix("")
    is_package = relative.name == "__init__"
    module = ".".join(relative.parts[:-1] if is_package else relative.parts)
    assert foreign_imports(path.read_text(encoding="utf-8"), module, is_package) == []


@pytest.mark.parametrize(
    ("text", "module", "bad"),
    [
        ("from routers.language.grammar import Grammar", "srpo.trainer.trainer", 1),
        ("def f():\n    import rewards", "srpo.x", 1),
        ("from srpo.types import ROUTE", "routers.x", 0),
        ("from srpo import types", "routers.x", 0),
        ("import srpo.types", "rewards.x", 0),
        ("import srpo", "rewards.x", 1),
        ("from srpo.config import SRPOConfig", "rewards.x", 1),
        ("from srpo import SRPOTrainer", "routers.x", 1),
        ("from srpo.rollout.loop import play", "routers.serving.x", 0),
        ("from srpo.trainer.trainer import SRPOTrainer", "routers.serving.x", 1),
        ("from srpo.trainer.trainer import SRPOTrainer", "routers.tasks.x.task", 0),
        ("from rewards import cost", "routers.x", 1),
        ("from routers.tasks.think_route.world import make_pool", "routers.evaluation.x", 1),
        ("from routers.tasks.think_route.world import make_pool", "routers.serving.x", 0),
        ("from routers.tasks.think_route.world import make_pool", "routers.tasks.query_routing.task", 1),
        ("from routers.tasks.query_routing.world import x", "routers.tasks.query_routing.task", 0),
        ("from . import sdpo\nfrom .grpo import token_loss", "srpo.objectives.srpo", 0),
        ("from ...routers import table", "srpo.objectives.srpo", 1),
    ],
)
def test_the_import_check_sees_what_it_must(text: str, module: str, bad: int) -> None:
    assert len(foreign_imports(text, module)) == bad


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def forbidden(text: str) -> list[str]:
    found = []
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = dotted(node.func)
            if name in FORBIDDEN_NAMES:
                found.append(f"line {node.lineno}: {name} runs text as code")
            if name in FORBIDDEN_CALLS:
                found.append(f"line {node.lineno}: {name} {FORBIDDEN_CALLS[name]}")
            for keyword in node.keywords:
                is_true = isinstance(keyword.value, ast.Constant) and keyword.value.value is True
                if keyword.arg in FORBIDDEN_KEYWORDS and is_true:
                    found.append(f"line {node.lineno}: {keyword.arg}=True")
    for name, line in imports(tree, "m", False):
        if name.split(".")[0] in FORBIDDEN_MODULES:
            found.append(f"line {line}: {name} is a pickle")
    return found


@pytest.mark.parametrize("path", sources(*PACKAGES, "scripts"), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_runs_text_or_reads_pickles(path: Path) -> None:
    sent = f": {SENT.get(path.relative_to(ROOT).as_posix())} is a pickle"
    assert [found for found in forbidden(path.read_text(encoding="utf-8")) if not found.endswith(sent)] == []


@pytest.mark.parametrize(
    "text",
    [
        "eval('1')",
        "x = exec(code)",
        "import pickle",
        "from pickle import loads",
        "torch.load(path, weights_only=True)",
        "yaml.load(f, Loader=yaml.SafeLoader)",
        "subprocess.run('ls', shell=True)",
        "AutoModel.from_pretrained(x, trust_remote_code=True)",
        "import joblib.externals",
    ],
)
def test_the_ban_sees_what_it_must(text: str) -> None:
    assert len(forbidden(text)) == 1


@pytest.mark.parametrize("text", ["model.eval()", "yaml.safe_load(f)", "run(x, shell=False)", "re.compile('eval(')"])
def test_the_ban_leaves_the_rest_alone(text: str) -> None:
    assert forbidden(text) == []


# Pure parts, and what they must not pull in: importing TRL takes ten seconds.
LIGHT = {
    "srpo.types": {"torch", "transformers", "trl", "datasets"},
    "srpo.ranges": {"torch", "transformers", "trl", "datasets"},
    "srpo": {"torch", "transformers", "trl", "datasets"},
    "srpo.recipe": {"torch", "transformers", "trl", "datasets"},
    "srpo.cli": {"torch", "transformers", "trl", "datasets"},
    "srpo.help": {"torch", "transformers", "trl", "datasets"},
    "srpo.launch": {"torch", "transformers", "trl", "datasets"},
    "srpo.settings": {"torch", "transformers", "trl", "datasets"},
    "srpo.checks": {"torch", "transformers", "trl", "datasets"},
    "srpo.hub.hub": {"torch", "transformers", "trl", "datasets"},
    "rewards": {"torch", "transformers", "trl", "datasets"},
    "routers": {"torch", "transformers", "trl", "datasets"},
    "routers.language.grammar": {"torch", "transformers", "trl", "datasets"},
    "routers.pool": {"torch", "transformers", "trl", "datasets", "openai"},
    "routers.data.table": {"torch", "transformers", "trl"},
    "srpo.objectives": {"transformers", "trl", "datasets"},
}


def test_pure_parts_import_without_trl() -> None:
    # One process for all, lightest first: what one of them pulls in would show in the next.
    order = sorted(LIGHT, key=lambda module: -len(LIGHT[module]))
    script = "\n".join(
        [
            "import importlib, sys",
            f"for module, heavy in {[(m, sorted(LIGHT[m])) for m in order]!r}:",
            "    importlib.import_module(module)",
            "    found = [name for name in heavy if name in sys.modules]",
            "    assert not found, f'importing {module} pulls in {found}'",
        ]
    )
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
