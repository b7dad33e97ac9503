"""The command `srpo`: its help comes at once; mistakes end with one line and code 2, faults with a traceback."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from srpo.cli import COMMANDS, main, underscored
from srpo.shipped import RECIPES, shipped_recipes
from srpo.task import task_names

ROOT = Path(__file__).resolve().parents[2]


def ended(body: str, *flags: str) -> tuple[int, str]:
    code = f"import sys\nfrom srpo.cli import run\nfrom srpo.recipe import load_recipe\n{body}\nrun(main)"
    done = subprocess.run([sys.executable, *flags, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("from srpo.task import *\ndef main(): load_recipe(RunArguments, ['--config=no.yaml'])", "no.yaml: No"),
        ("from srpo.ranges import *\ndef main(): check_number('n', 0, above(0))", "n=0: must be above 0"),
        ("def main(): open('nowhere/at/all')", "nowhere/at/all: No such file or directory"),
        ("def main(): raise OSError('two\\nlines')", "two lines"),
        ("def main(): import uvicorn_of_nobody", "No module named 'uvicorn_of_nobody': pip install uvicorn_of_nobody"),
    ],
)
def test_a_mistake_is_one_line(body: str, words: str) -> None:
    code, err = ended(body)
    assert code == 2 and err.startswith("error: ") and words in err and len(err.splitlines()) == 1, err


def test_a_fault_keeps_its_traceback_and_a_number_is_the_code() -> None:
    for body in ("def main(): int('x')", "def main(): {}['key']", "def main(): list(zip([1], [], strict=True))"):
        code, err = ended(body)
        assert code == 1 and "Traceback" in err, err
    code, err = ended("from srpo.ranges import *\ndef main(): check_number('n', 0, above(0))", "-X", "dev")
    assert code == 1 and "Traceback" in err and "n=0" in err
    assert ended("def main(): return 3") == (3, "") and ended("def main(): return 'a table'") == (0, "")
    stopped = ended("from srpo.types import Stopped\ndef main(): raise Stopped('$3 are spent')")
    assert stopped == (1, "STOPPED: $3 are spent\n")


# ------------------------------------------------------------------------------------------------ help, at once


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `srpo WORDS`, in this process."""
    capsys.readouterr()
    argv = sys.argv
    try:
        main(words)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        sys.argv = argv
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_the_first_screen_of_help_is_short_and_at_once(command: str) -> None:
    """60 lines, an example, and neither torch nor TRL; processor seconds: the machine may be busy."""
    code = "import resource, runpy, sys\nsys.argv[0] = 'srpo'\n"
    code += "try:\n    runpy.run_module('srpo', run_name='__main__', alter_sys=True)\nexcept SystemExit as end:\n"
    code += "    heavy = {'torch', 'trl', 'transformers', 'datasets'} & {*sys.modules}\n"
    code += "    used = resource.getrusage(resource.RUSAGE_SELF)\n"
    code += "    print(f'{end.code}|{sorted(heavy)}|{used.ru_utime + used.ru_stime}', file=sys.stderr)\n"
    words = [command, "--help"] if command else ["--help"]
    run = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=120)
    status, heavy, seconds = run.stderr.splitlines()[-1].split("|")
    assert status in ("0", "None") and heavy == "[]", run.stderr
    assert float(seconds) < 2.0
    lines = run.stdout.splitlines()
    assert len(lines) <= 60 and max(map(len, lines)) <= 119
    assert run.stdout.count(f"srpo {command}".strip()) >= 2, "usage, and an example"


def test_every_command_has_a_module() -> None:
    assert all(importlib.util.find_spec(module) for module, _ in COMMANDS.values())


@pytest.mark.parametrize("task", task_names())
def test_the_help_of_training_shows_the_task_s_keys(task: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = printed(capsys, "train", "--task", task, "--help")
    assert code == 0 and f"task: {task}" in out
    assert "max_turns = 4" in out and "teacher_model_kind = 'ema'  (or trust_region, frozen, live)" in out
    assert "lora_r = 0" in out and ("cost_weight" in out) and "per_device_train_batch_size" not in out
    assert len(out.splitlines()) <= 75


def test_the_help_of_a_recipe_is_that_of_its_task(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = printed(capsys, "train", "quickstart/think_route", "--help")
    assert code == 0 and "task: think_route" in out and "task: query_routing" not in out


def test_help_all_says_what_every_key_does_and_trl_s_too(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = printed(capsys, "train", "--help-all")
    assert code == 0
    assert "teacher_model_kind: ema, trust_region, frozen, live ['ema']" in out
    assert "per_device_train_batch_size" in out and "lambda in" in out


# ---------------------------------------------------------------------------------------------- shipped recipes


@pytest.mark.parametrize("spelt", ["--max_cost_usd", "--max-cost-usd", "--max-cost_usd"])
def test_options_are_taken_with_dashes_and_shown_without(spelt: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = printed(capsys, "record", "--catalogue", "no-such.yaml", "--queries", "a", f"{spelt}=0.5-")
    assert code == 2 and "argument --max_cost_usd: '0.5-' is not a number" in err
    words = ["--max-cost-usd", "a-b", "--x-y=c-d", "-p-q", "--", "--k-l"]
    assert underscored(words) == ["--max_cost_usd", "a-b", "--x_y=c-d", "-p-q", "--", "--k-l"]
    for command in sorted({*COMMANDS} - {"train", "evaluate"}):
        code, out, _ = printed(capsys, command, "--help")
        assert code == 0 and not re.findall(r"(?<![\w-])--[a-z]+-[a-z-]+", out), command


def test_recipes_are_listed_with_what_they_are_and_copied(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, _ = printed(capsys, "recipes")
    assert code == 0 and [line.split()[0] for line in out.splitlines()] == list(shipped_recipes())
    assert all(len(line.split(maxsplit=1)[1]) > 20 for line in out.splitlines())
    monkeypatch.chdir(tmp_path)
    assert printed(capsys, "recipes", "copy", "quickstart/srpo", "mine/one.yaml")[:2] == (0, "mine/one.yaml\n")
    assert printed(capsys, "recipes", "copy", "quickstart/srpo")[1] == "srpo.yaml\n"
    assert (tmp_path / "mine/one.yaml").read_bytes() == (RECIPES / "quickstart/srpo.yaml").read_bytes()
    code, _, err = printed(capsys, "recipes", "copy", "quickstart/srpo")
    assert code == 2 and err == "error: srpo.yaml exists already: name another file\n"


def test_the_table_of_keys_is_current(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = printed(capsys, "recipes", "keys")
    assert out == (ROOT / "recipes" / "KEYS.md").read_text(), "run: srpo recipes keys > recipes/KEYS.md"


# ------------------------------------------------------------------------------------------------ mistakes

RECIPE = "task: query_routing\nobjective: srpo\nuse_cpu: true\nbf16: false\noutput_dir: out\n"
MISTAKES = {
    # words of `srpo`, what the recipe holds besides, what is said
    "command": ("trian", "", "the nearest is srpo train"),
    "no file": (
        "train quickstart/bop.yaml",
        "",
        "quickstart/bop.yaml: No such file, and no shipped recipe; the nearest are quickstart/bopo,",
    ),
    "no task": ("train --output_dir out", "", "no task is named"),
    "task": ("train r.yaml --task query_rooting", "", "'query_rooting' is not a task; .*nearest: query_routing"),
    "key": ("train r.yaml", "cost_wieght: 1", "r.yaml:6: unknown key 'cost_wieght'; .*'cost_weight'"),
    "key of TRL's": ("train r.yaml", "max_stepz: 1", "r.yaml:6: unknown key 'max_stepz'; .*'max_steps'"),
    "old key": ("train r.yaml", "warm_start_epochs: 1", "r.yaml:6: 'warm_start_epochs' is now 'sft_epochs'"),
    "old option": ("train r.yaml --eval_limit 5", "", "'--eval_limit' is now 'heldout_limit'"),
    "option": ("train r.yaml --sede 1", "", "unknown option '--sede'; .*'seed'"),
    "word": ("train r.yaml 5", "", "'5' belongs to no option"),
    "no value": ("train r.yaml --seed", "", "a value is missing; seed must be an integer"),
    "twice": ("train r.yaml", "task: think_route", "r.yaml:6: the key 'task' was already written in line 1"),
    "type": ("train r.yaml", "lora_r: high", "r.yaml:6: lora_r must be an integer, not 'high'"),
    "range": ("train r.yaml", "cost_weight: 2", "r.yaml:6: cost_weight=2.0: must be in"),
    "range of TRL's": ("train r.yaml --learning_rate -1", "", "learning_rate=-1.0: must be at least 0"),
    "choice": ("train r.yaml", "demonstration: last", "demonstration='last' is not one of first, random, best"),
    "secret": ("train r.yaml", "run_name: hf_" + "aB3" * 10, "r.yaml:6: .*looks like a secret"),
    "YAML": ("train r.yaml", "a: [b", "not valid YAML"),
    "table": ("train r.yaml", "table: no.parquet", "no.parquet"),
    "encoder": ("train r.yaml --train_limit 5", "model_name_or_path: encoder", "at least 10 training queries, .* 5"),
    "report": ("train r.yaml --report_to wanbd", "", "report_to: there is no 'wanbd'; there are none, all, azure_ml"),
    "report of a package": (
        "train r.yaml --report_to neptune",
        "",
        "report_to: neptune needs a package .* install nept",
    ),
    "reward": ("train r.yaml", "rewards: [{speed: 1.0}]", "speed"),
    "folder": ("train r.yaml --output_dir r.yaml", "", "output_dir r.yaml is a file"),
    "policy": ("train r.yaml", "model_name_or_path: ./no/policy", "no/policy"),
    "batch": ("train r.yaml", "per_device_train_batch_size: 3\nnum_generations: 2", "num_generations|multiple"),
    "processes": ("train r.yaml --processes none", "", "--processes none: must be a whole number"),
    "accelerate": ("train r.yaml --accelerate fsdp3", "", "neither a file nor one of cpu, ddp, fsdp2, zero2, zero3"),
    "evaluate": ("evaluate", "", "name the policy first"),
    "copy": ("recipes copy quickstart/srop", "", "no shipped recipe; the nearest are quickstart/srpo,"),
    "push": ("push out someone/router", "", "out: there is no such folder"),
    "convert": ("convert llmrouter no/folder --output t.parquet", "", "no/folder: not found; download llmrouter from"),
    "plan": ("plan r.yaml", "objective: x", "already written in line 2"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_user_s_mistake_is_one_line_and_code_2(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words, more, said = MISTAKES[name]
    (tmp_path / "r.yaml").write_text(RECIPE + more + "\n")
    monkeypatch.chdir(tmp_path)
    code, _, err = printed(capsys, *words.split())
    assert code == 2
    lines = [line for line in err.splitlines() if "error:" in line]
    assert len(lines) == 1 and re.search(said, lines[0]) and "Traceback" not in err, err
    assert [path.name for path in tmp_path.iterdir()] == ["r.yaml"]


def launched(tmp_path: Path, *words: str) -> tuple[int, list[str]]:
    """A mistake that only the processes themselves can find; exit code, and what was said on standard error."""
    (tmp_path / "r.yaml").write_text(RECIPE + "max_stepz: 1\n")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        [sys.executable, "-m", *words],
        cwd=tmp_path, capture_output=True, text=True, timeout=500, env={**environment, "PYTHONPATH": path},
    )  # fmt: skip
    return run.returncode, run.stderr.splitlines()


SAID = "error: r.yaml:6: unknown key 'max_stepz'; the nearest valid name is 'max_steps'"


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("how", [["--processes", "2"], ["--accelerate", "cpu"]], ids=["two", "accelerate"])
def test_a_mistake_in_several_processes_is_still_one_line(how: list[str], tmp_path: Path) -> None:
    assert launched(tmp_path, "srpo", "train", "r.yaml", *how) == (2, [SAID])


@pytest.mark.slow
def test_accelerate_s_own_command_adds_its_own_words_after_ours_and_ends_with_1(tmp_path: Path) -> None:
    """What is not in our hands, written down: the launcher forgets our code, and is silent only with --quiet. Hence
    `srpo train --accelerate`."""
    config = ["--config_file", str(RECIPES / "accelerate" / "cpu.yaml")]
    command = ["accelerate.commands.launch", *config, "--quiet", "-m", "srpo.train", "--config", "r.yaml"]
    assert launched(tmp_path, *command) == (1, [SAID])
