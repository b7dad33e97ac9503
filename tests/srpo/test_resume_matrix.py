"""8 = 4 + 4 steps bit for bit, in a new interpreter: objective x where the checkpoint falls x policy x world."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from resume_matrix import CELLS
from safetensors.torch import load_file

FEW = ["grpo-inside accumulation-full-world", "bopo-epoch end-lora-environment", "srpo-inside batch-full-environment"]


def both(folder, *cells):
    script = Path(__file__).parents[1] / "support" / "resume_matrix.py"
    for part in ("straight", "resumed"):
        words = [sys.executable, script, str(folder), part, *cells]
        done = subprocess.run(words, capture_output=True, text=True, timeout=2400)
        assert done.returncode == 0, done.stderr[-8000:]
    return folder


def same(folder, cell):
    name = cell.replace(" ", "_")
    straight, resumed = (load_file(folder / f"{name}-{part}.st") for part in ("straight", "resumed"))
    assert straight.keys() == resumed.keys()
    kinds = {key.split("/")[0] for key in straight}
    assert {"model", "optimizer", "log"} <= kinds
    assert ("ledger" in kinds) is cell.endswith("environment") and ("teacher" in kinds) is not cell.startswith("grpo")
    assert len(set(straight["log/loss"].tolist())) >= 5, "hardly a step did anything: the cell is empty"
    if "teacher" in kinds:
        assert (straight["log/srpo/distilled_share"] > 0).any(), "nothing was distilled: the cell is empty"
    if "ledger" in kinds:
        assert straight["ledger/cached"] > 0 and straight["ledger/spent"] > 0
    assert not [key for key in straight if not torch.equal(straight[key], resumed[key])]


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    return both(tmp_path_factory.mktemp("resume"), *FEW)


@pytest.mark.parametrize("cell", FEW)
def test_a_few_resume_bitwise(few, cell):
    same(few, cell)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return both(tmp_path_factory.mktemp("resume"))


@pytest.mark.slow
@pytest.mark.parametrize("cell", CELLS)
def test_resuming_is_bitwise(whole, cell):
    same(whole, cell)
