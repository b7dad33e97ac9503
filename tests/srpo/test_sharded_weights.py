"""On two real processes, whatever the engine: a policy's files hold the policy, and a resumed run goes on with it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from core_helpers import distance, model
from peft import PeftModel
from safetensors.torch import load_file
from sharded_weights_cases import ENGINES, POLICIES, ids, policies_of, trained
from transformers import AutoModelForCausalLM

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
WRAPPED = {"ddp": "DistributedDataParallel", "zero2": "DeepSpeedEngine", "zero3": "DeepSpeedEngine", "fsdp2": "FSDP"}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """(policy, resumed) -> the logits and the teacher's weights of one process."""
    folder, found = tmp_path_factory.mktemp("alone"), {}
    for policy in POLICIES:
        for resumed in (False, True):
            made, logits = trained(folder, policy, "ema", 1, {}, resumed)
            made.teacher.save(str(folder))
            found[policy, resumed] = logits, load_file(folder / "teacher.safetensors")
    return found


@pytest.fixture(scope="module", params=ENGINES)
def launched(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    script = Path(__file__).parents[1] / "support" / "sharded_weights_cases.py"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launch, str(script), str(folder), request.param], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return request.param, folder


def plain(folder, policy):
    """The logits of a folder for whoever knows transformers and peft only."""
    if POLICIES[policy] is None:
        network = AutoModelForCausalLM.from_pretrained(folder)
    else:
        network = PeftModel.from_pretrained(model(), folder)
    with torch.no_grad():
        return network.eval()(input_ids=ids(), attention_mask=torch.ones_like(ids())).logits


@pytest.mark.parametrize("resumed", [False, True], ids=["straight", "resumed"])
@pytest.mark.parametrize("policy", POLICIES)
def test_what_an_engine_saves_is_the_policy_that_one_process_trains(launched, alone, policy, resumed):
    engine, folder = launched
    if policy not in policies_of(engine):
        pytest.skip("refused: see test_a_tied_head_is_no_copy_of_a_sharded_model")
    name = f"{policy}_{'resumed' if resumed else 'straight'}"
    assert WRAPPED[engine] in json.loads((folder / f"{name}.json").read_text())["engine"]
    saved = plain(folder / name, policy)
    trained_there = load_file(folder / f"{name}_logits.st")["logits"]
    torch.testing.assert_close(saved, trained_there, rtol=1e-5, atol=1e-5)
    logits, teacher = alone[policy, resumed]
    torch.testing.assert_close(saved, logits, rtol=1e-3, atol=1e-3)
    own = load_file(folder / f"{name}_teacher.st")
    assert distance(own, teacher) < 1e-4
    assert not [path for path in (folder / name).iterdir() if "teacher" in path.name or path.is_dir()]


@pytest.mark.parametrize("engine", ["zero3", "fsdp2"])
def test_a_tied_head_is_no_copy_of_a_sharded_model(engine, tmp_path):
    script = Path(__file__).parents[1] / "support" / "sharded_weights_cases.py"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launch, str(script), str(tmp_path), engine, "whole_head"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode != 0 and "are sharded (FSDP, ZeRO-3): use ZeRO-2 or DDP" in done.stderr
