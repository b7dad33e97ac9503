"""A task that another package brings: trained by the same command; one process's error ends all of them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from srpo.policy_name import check_policy_name

ROOT = Path(__file__).resolve().parents[2]
MODULE = """
import json
import os
from dataclasses import dataclass
from srpo.task import Corpus

COLOURS = ["red", "cat"]


@dataclass
class Arguments:
    favourite: str = "red"


class Marks:
    def __init__(self, rows):
        self.rows = rows

    @classmethod
    def merged(cls, parts):
        return cls([row for part in parts for row in part.rows])

    @classmethod
    def read(cls, path):
        return cls(json.loads(path.read_text()))

    def write(self, path):
        path.write_text(json.dumps(self.rows))


class Colours:
    Arguments, episodes, correctness, sft_options = Arguments, Marks, None, {"mean": "rows"}

    def __init__(self, arguments, run, config):
        self.arguments = arguments

    def load(self, notes): ...

    def corpus(self):
        size = {"hidden": 32, "intermediate": 32}
        return Corpus([f"say {colour}" for colour in COLOURS] * 4, COLOURS, 400, shape=size)

    def rows(self, tokenizer):
        return [{"prompt": f"say {COLOURS[i % 2]}", "query_id": str(i)} for i in range(8)]

    def made_from(self):
        return {"favourite": self.arguments.favourite}, {}

    def prepare(self, output, rows):
        return rows

    def sft_rows(self, tokenizer, ends):
        ids = tokenizer("say red red")["input_ids"] + [ends[0]]
        return [{"input_ids": ids, "labels": [-100, -100, *ids[2:]]}] * 4

    def save(self, folder):
        (folder / "router.yaml").write_text(f"favourite: {self.arguments.favourite}")

    def world(self):
        return lambda rows, texts: {"correct": [float(self.arguments.favourite in text) for text in texts]}

    def environment(self, tokenizer):
        return None

    def allowed_tokens(self, tokenizer):
        return None

    def rewards(self):
        return [lambda completions, correct, **columns: correct], [1.0]

    def callbacks(self):
        return []

    def finish(self, trainer, output): ...

    def evaluate(self, policy, tokenizer, name, share):
        if name == os.environ.get("RAISE_AT") and share.rank == 1:
            raise OSError("the disk of process 1 is gone")
        return Marks([[name, item] for item in share.of(range(5))])

    def baselines(self, share):
        return None

    def report(self, evaluation, output):
        return f"{len(evaluation.rows)} marks"
"""
POINTS = "[srpo.tasks]\ncolours = colours_of_mine:Colours\n"
WORDS = """--task colours --favourite cat --use_cpu true --bf16 false --max_steps 1 --num_generations 2
    --save_strategy no --per_device_train_batch_size 4
    --max_completion_length 4 --sft_epochs 1 --sft_batch_size 2 --report_to none
    --activation_checkpointing false""".split()


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Of a process in which a package with the task is installed."""
    site = tmp_path / "site"
    info = site / "colours_of_mine-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "colours_of_mine.py").write_text(MODULE)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: colours\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(POINTS)
    path = os.pathsep.join([str(site), str(ROOT), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path}


def launch(processes: int, environment: dict[str, str], output: Path) -> "subprocess.CompletedProcess[str]":
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else []), "-m", "srpo.train", *WORDS]
    return subprocess.run(
        [*command, "--output_dir", str(output)], env=environment, capture_output=True, text=True, timeout=400
    )


def test_a_package_brings_a_task(environment: dict[str, str], tmp_path: Path) -> None:
    done = launch(1, environment, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "10 marks" in done.stdout.splitlines()
    marks = json.loads((tmp_path / "out" / "evaluation.parquet").read_text())
    assert marks == [[name, i] for name in ("start", "srpo") for i in range(5)]
    for folder in ("out", "out/start"):
        assert (tmp_path / folder / "router.yaml").read_text() == "favourite: cat"
        check_policy_name(str(tmp_path / folder))
        (tmp_path / folder / "tokenizer.json").unlink()  # half of it was copied
        with pytest.raises(FileNotFoundError, match=r"/tokenizer\.json is missing\. .*delete manifest\.json there"):
            check_policy_name(str(tmp_path / folder))
    wrong = subprocess.run(
        [sys.executable, "-m", "srpo.train", "--task", "colour", "--output_dir", str(tmp_path / "x")],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert wrong.returncode == 2 and "'colour' is not a task" in wrong.stderr and "nearest: colours" in wrong.stderr
    assert "Traceback" not in wrong.stderr
    words = [*WORDS, "--eval_strategy", "steps", "--eval_steps", "1", "--output_dir", str(tmp_path / "y")]
    wrong = subprocess.run(
        [sys.executable, "-m", "srpo.train", *words], env=environment, capture_output=True, text=True
    )
    assert wrong.returncode == 2 and "colours has no items to choose a checkpoint on" in wrong.stderr
    assert not (tmp_path / "y").exists()


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("name", ["start", "srpo"])
def test_an_evaluation_that_raises_on_one_process_ends_all(
    environment: dict[str, str], tmp_path: Path, name: str
) -> None:
    whole = launch(2, environment, tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    marks = json.loads((tmp_path / "whole" / "evaluation.parquet").read_text())
    assert sorted(marks) == sorted([n, i] for n in ("start", "srpo") for i in range(5)), "each item once"
    done = launch(2, {**environment, "RAISE_AT": name}, tmp_path / "out")
    assert done.returncode != 0
    said = done.stdout + done.stderr
    assert "process 1: error: the disk of process 1 is gone" in said and "STOPPED" not in said
