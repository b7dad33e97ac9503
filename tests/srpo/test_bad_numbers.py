"""A NaN or an infinity, wherever it comes from: the step is left out, bitwise; three in a row end the run."""

import json
import math
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from bad_number_cases import KINDS, Injected, everything, on_engine, run
from core_helpers import binary_reward, config, equal, logged, trainer, weights
from transformers import TrainerCallback
from two_ranks import two_ranks

from srpo.trainer.bad_numbers import BadNumbers
from srpo.trainer.rewards import of_models

STEP = 2


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_the_step_is_left_out_and_the_batch_is_kept(tmp_path: Path, kind: str, accumulation: int) -> None:
    made, states = run(tmp_path, kind, accumulation, at={STEP})
    assert [equal(a, b) for a, b in pairwise(states)] == [
        step == STEP for step in range(2, made.state.global_step + 1)
    ], "weights, optimiser and teacher stay in that step alone, to the last bit"
    assert all(value.isfinite().all() for value in states[-1].values())
    losses = logged(made, "loss")
    assert len(losses) == 4 and math.isnan(losses[STEP - 1]) and logged(made, "bad_steps") == [1.0]
    assert all(math.isfinite(loss) for i, loss in enumerate(losses) if i != STEP - 1)
    lines = (tmp_path / "bad_steps" / "step_00002_0.jsonl").read_text().splitlines()
    rows = [json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is no JSON")) for line in lines]
    assert len(rows) == 16 and all(row["prompt"] and "completion" in row for row in rows)
    named = {name for row in rows for name in row["not_finite"]}
    assert named == {"reward": {"reward"}, "log-prob": {"old_per_token_logps"}}.get(kind, set())


@pytest.mark.parametrize("kind", ["loss", "reward"])
def test_three_in_a_row_end_the_run_with_the_cause(tmp_path: Path, kind: str) -> None:
    with pytest.raises(BadNumbers, match=r"^3 steps in a row were not finite, the last, 4, because of: .*") as raised:
        run(tmp_path, kind, 1, at={2, 3, 4}, max_steps=9, save_strategy="steps", save_steps=1)
    cause = {"loss": "the loss of micro-batch 1 is nan", "reward": "'injected' returned for row 1 (query_id "}[kind]
    assert cause in str(raised.value) and "\n" not in str(raised.value)
    for path in tmp_path.glob("checkpoint-*/model.safetensors"):
        from safetensors.torch import load_file

        assert all(value.isfinite().all() for value in load_file(path).values())
    # Two in a row, twice: the count begins again.
    run(tmp_path / "again", kind, 1, at={1, 2, 4, 5}, max_steps=6)


def test_weights_that_are_no_numbers_are_never_saved(tmp_path: Path) -> None:
    made = trainer(config(tmp_path, max_steps=2, save_strategy="steps", save_steps=1))

    class Overflowing(TrainerCallback):
        def on_step_end(self, *_: object, **__: object) -> None:
            made.model.model.norm.weight.data[0] = math.inf

    made.add_callback(Overflowing())
    with pytest.raises(BadNumbers, match="the weights are not finite any more, first model"):
        made.train()
    assert not any(tmp_path.glob("checkpoint-*")) and not (tmp_path / "model.safetensors").exists()


def test_a_nan_of_a_reward_model_is_no_reward_that_does_not_apply() -> None:
    values = torch.tensor([[math.nan, math.nan], [1.0, 2.0]])
    found = of_models(values, [torch.nn.Linear(1, 1), binary_reward])
    assert found[0, 0] == math.inf and found[0, 1].isnan() and found[1].tolist() == [1.0, 2.0]


def test_rewards_as_large_as_numbers_go(tmp_path: Path) -> None:
    signs = iter([1, -1] * 1000)
    made = trainer(
        config(tmp_path, objective="srpo", max_steps=2, optim="adamw_torch", max_grad_norm=1.0),
        rewards=lambda completion_ids, **_: [1e38 * next(signs) * binary_reward([ids])[0] for ids in completion_ids],
    )
    before = weights(made.model)
    made.train()
    assert all(torch.isfinite(value).all() for value in weights(made.model).values())
    assert equal(before, weights(made.model)) == any((tmp_path / "bad_steps").glob("step_00002*"))


def test_an_evaluation_leaves_out_what_is_no_number(tmp_path: Path) -> None:
    from core_helpers import dataset

    args = config(tmp_path, per_device_eval_batch_size=16, objective="grpo")
    made = trainer(args, rewards=Injected("reward", {0}), eval_dataset=dataset(4))
    assert math.isfinite(made.evaluate()["eval_reward"])


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(1000)
def test_all_ranks_leave_out_the_same_steps(tmp_path: Path) -> None:
    """Each kind on rank 0 and on rank 1 alone, with one micro-batch and with two."""
    script = str(Path(__file__).parents[1] / "support" / "bad_number_cases.py")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run([*launch, script, str(tmp_path)], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    found = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    assert len(found[0]) == (len(KINDS) + 1) * 4
    for case, record in found[0].items():
        if case.startswith("parameter"):  # it stays: three steps, and the run ends
            assert record == found[1][case] and record["saved"] == [], case
            assert "the weights are not finite any more, first " in record["error"], case
            assert "3 steps in a row were not finite, the last, 4, because of: process" in record["error"], case
            continue
        assert record["kept"] == found[1][case]["kept"] == [True, False], case
        assert record["end"] == found[1][case]["end"], "both ranks have the same weights"
        kind, where, _ = case.split("/")
        # Rows are dealt out anew to the processes: a bad one's batch may be another process's.
        files = {"loss": [[where]], "gradient": [["rank0", "rank1"]]}.get(kind, [["rank0"], ["rank1"]])
        assert record["files"] in files, case
        assert kind != "reward" or "'injected' returned for row 1" in record["cause"], case


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(1000)
@pytest.mark.parametrize("engine", ["zero2", "zero3", "fsdp2"])
def test_engines_leave_out_a_step_bitwise_and_save_no_nan(tmp_path: Path, engine: str) -> None:
    """On the second process alone, with two micro-batches; what lies on each process is compared."""
    import deepspeed  # noqa: F401  which every fork would import by itself

    codes, _, said = two_ranks(tmp_path, lambda rank, port: on_engine(tmp_path, engine, rank, port), 900)
    assert codes == [0, 0], said[-4000:]
    for found in (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)):
        for kind in ("loss", "gradient"):
            record = found[kind]
            assert record["wrapped"] == {"fsdp2": "FSDPQwen3ForCausalLM"}.get(engine, "DeepSpeedEngine")
            assert record["kept"] == [True, False], "weights, optimiser and teacher, to the last bit"
            assert record["moved"] == ["model", "optimizer", "teacher"] and record["finite"]
            bad = [(count, math.isnan(loss)) for count, loss in record["logged"]]
            assert bad == [(None, False), (1.0, True), (None, False)] and record["saved"] == 3
            cause = {"loss": "process 1: the loss of micro-batch 2 is nan", "gradient": "the gradient's norm is"}[kind]
            assert record["cause"].startswith(cause)
        assert "the weights are not finite any more, first " in found["parameter"]["error"]
        assert found["parameter"]["saved"] == []


def test_everything_that_a_step_moves_is_compared(tmp_path: Path) -> None:
    made, _ = run(tmp_path, "loss", 1, at=set(), max_steps=1)
    kinds = {name.split("/")[0] for name in everything(made)}
    assert kinds == {"model", "optimizer", "teacher"}
