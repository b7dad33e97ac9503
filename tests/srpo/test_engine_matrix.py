"""Dense and MoE, full and LoRA, on every engine of two processes: trained, evaluated, saved, resumed and pushed."""

import json
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from engine_matrix import CELLS, STRANGERS, base, logits
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(3000)]  # one launch trains all cells
WRAPPED = {"ddp": "DistributedDataParallel", "zero2": "DeepSpeedEngine", "zero3": "DeepSpeedEngine", "fsdp2": "FSDP"}
NAMES = {"ddp": "no engine", "zero2": "ZeRO-1 or 2", "zero3": "ZeRO-3", "fsdp2": "FSDP"}
WEIGHTS = {"full": "model.safetensors", "lora": "adapter_model.safetensors"}


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    folder = tmp_path_factory.mktemp("engines")
    script = Path(__file__).parents[1] / "support" / "engine_matrix.py"
    done = subprocess.run([sys.executable, script, str(folder)], capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stderr[-8000:]
    return folder


def plain(folder, cell):
    """The policy of a folder for whoever knows transformers and peft only."""
    if cell.endswith("full"):
        return AutoModelForCausalLM.from_pretrained(folder)
    return PeftModel.from_pretrained(base(cell, folder.parents[1]), folder)


def check(folder, cell, part):
    out, (engine, _, policy) = folder / cell, cell.split("-")
    ranks = [json.loads(path.read_text()) for path in sorted(out.glob(f"{part}_?.json"))]
    found = [load_file(path) for path in sorted(out.glob(f"{part}_?.st"))]
    assert len(ranks) == ranks[0]["processes"] == (1 if engine == "alone" else 2)
    assert engine == "alone" or WRAPPED[engine] in ranks[0]["engine"], "not the engine that was asked for"

    saved = logits(plain(out / part, cell))
    for rank in found:
        torch.testing.assert_close(rank["engine"], saved, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(rank["whole"], saved, rtol=1e-5, atol=1e-5)
    if policy == "lora":
        plain(out / part, cell).merge_and_unload().save_pretrained(out / f"{part}_merged")
        merged = logits(AutoModelForCausalLM.from_pretrained(out / f"{part}_merged"))
        torch.testing.assert_close(merged, saved, rtol=1e-5, atol=1e-5)

    assert all(rank["pushed"] for rank in ranks)
    remote = folder / "hub" / "me" / f"{cell}-{part}"
    hashes = [sha256((where / WEIGHTS[policy]).read_bytes()).hexdigest() for where in (remote, out / part)]
    assert hashes[0] == hashes[1]
    assert sorted(path.name for path in remote.glob("*.safetensors")) == [WEIGHTS[policy]]
    return ranks[0]


@pytest.mark.parametrize("cell", CELLS)
def test_an_engine_trains_saves_resumes_and_pushes_the_policy(launched, cell):
    engine, *policy = cell.split("-")
    straight, resumed = check(launched, cell, "straight"), check(launched, cell, "resumed")
    for name in (WEIGHTS[policy[1]], "teacher.safetensors"):
        one, other = (load_file(launched / cell / part / name) for part in ("straight", "resumed"))
        assert not [key for key in one if not torch.equal(one[key], other[key])], name
    timeless = [{k: v for k, v in run["log"]["3"].items() if k != "step_time"} for run in (straight, resumed)]
    assert timeless[0] == timeless[1] and straight["evaluated"] == resumed["evaluated"]

    alone = json.loads((launched / f"alone-{'-'.join(policy)}" / "straight_0.json").read_text())
    for name in ("loss", "grad_norm", "reward", "entropy", "srpo/distilled_share", "srpo/teacher_entropy"):
        ours, theirs = ([run["log"][step][name] for step in "123"] for run in (straight, alone))
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5), name
    for name in ("eval_reward", "eval_loss", "eval_completions/mean_length"):
        assert straight["evaluated"][name] == pytest.approx(alone["evaluated"][name], rel=1e-3, abs=1e-5), name
    if engine == "alone":
        assert straight["log"]["1"]["srpo/distilled_share"] > 0 and straight["log"]["3"]["grad_norm"] > 0.01


@pytest.mark.parametrize(("engine", "wrote"), STRANGERS)
def test_what_cannot_be_resumed_is_refused_in_a_sentence(launched, engine, wrote):
    words = (launched / f"{engine}_after_{wrote}.txt").read_text()
    expected = f"was written with {NAMES[wrote]} and this run has {NAMES.get(engine)}"
    if engine == "alone":
        expected = "was written by 2 processes and this run has 1"
    assert expected in words and "or start a new run from its weights" in words and "\n" not in words
