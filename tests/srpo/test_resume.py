"""Eight steps are those up to a checkpoint and the rest in a new interpreter, bit for bit: weights, states, money."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from resume_cases import CELLS, FEW
from safetensors.torch import load_file

from srpo.trainer.checkpoint import Checkpoints
from srpo.trainer.clock import Calendar
from srpo.trainer.nested import load_nested, nested_bytes, nested_of, save_nested


def both(folder, *cells):
    script = Path(__file__).parents[1] / "support" / "resume_cases.py"
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
    has_teacher = not (cell.startswith("grpo") or "live" in cell)
    assert ("ledger" in kinds) is cell.endswith("environment") and ("teacher" in kinds) is has_teacher
    assert len(set(straight["log/loss"].tolist())) >= 5, "hardly a step did anything: the cell is empty"
    if not cell.startswith("grpo"):
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


def test_nested_tensors_come_back_bit_for_bit(tmp_path):
    whole = torch.arange(6.0)
    value = {
        "a": [whole[:3], None, whole[3:]],  # slices share memory
        "b": {"c": torch.tensor(float("nan")), "d": 0.1, "e": "text", "tensor": True},
        "f": [torch.tensor([True, False]), torch.zeros(0, 4), torch.eye(3).T.bfloat16()],
    }
    save_nested(value, tmp_path / "x.safetensors")
    for back in (load_nested(tmp_path / "x.safetensors"), nested_of(nested_bytes(value))):
        assert back["a"][1] is None and torch.equal(torch.cat([back["a"][0], back["a"][2]]), whole)
        assert back["b"]["c"].isnan() and back["b"]["c"].ndim == 0
        assert (back["b"]["d"], back["b"]["e"], back["b"]["tensor"]) == (0.1, "text", True)
        for ours, theirs in zip(value["f"], back["f"], strict=True):
            assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    assert nested_of(nested_bytes({})) == {}
    with pytest.raises(TypeError):
        save_nested({"a": object()}, tmp_path / "y.safetensors")


def test_the_last_step_of_an_epoch_may_be_a_short_one():
    """Three micro-steps an epoch, two a step: 2, 1, 2, 1, ... of which the fourth begins after 5."""
    calendar = Calendar(accumulation=2, epoch=3)
    assert [calendar.micro_steps(n) for n in range(6)] == [0, 2, 3, 5, 6, 8]
    assert [calendar.when(n) for n in range(7)] == [(0, 0), (0, 1), (1, 0), (2, 0), (2, 1), (3, 0), (4, 0)]
    assert Calendar(2).micro_steps(9) == 18 and Calendar(2).when(19) == (9, 1)


def refuse(folder, processes, engine="NO", stage=0):
    state = SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=stage))
    run = SimpleNamespace(num_processes=processes, distributed_type=engine, state=state)
    Checkpoints(run, None, None, None).refuse_other_run(str(folder))


@pytest.mark.parametrize(("files", "processes", "wrote"), [(2, 1, 2), (0, 2, 1)])
def test_another_number_of_processes_is_refused(tmp_path, files, processes, wrote):
    names = [f"rng_state_{rank}.pth" for rank in range(files)] or ["rng_state.pth"]
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=f"was written by {wrote} processes and this run has {processes}"):
        refuse(tmp_path, processes)
    refuse(tmp_path, wrote)


def test_a_checkpoint_of_weights_only_says_nothing_of_processes(tmp_path):
    refuse(tmp_path, 4)
    refuse(tmp_path, 4, "FSDP")
