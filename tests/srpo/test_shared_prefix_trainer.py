"""Whole runs with shared prefixes end where runs without end: objectives, LoRA, experts, decisions, resumed runs."""

from pathlib import Path
from typing import Any

import core_helpers as core
import pytest
import replay_cases as moe
import torch
from peft import LoraConfig

from srpo.trainer.parts import base_of

STEPS = 20


def spied(made: Any) -> list[tuple[bool, bool]]:
    """(with gradient, packed) of each pass of the policy's backbone."""
    seen: list[tuple[bool, bool]] = []
    base = base_of(made, made.model)

    def look(_module: Any, _args: Any, kwargs: Any) -> None:
        mask = kwargs.get("attention_mask")
        seen.append((torch.is_grad_enabled(), isinstance(mask, torch.Tensor) and mask.dim() == 4))

    base.base_model.register_forward_pre_hook(look, with_kwargs=True)
    return seen


def run(folder: Path, mode: str, **changes: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    peft = (
        LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False) if changes.pop("lora", False) else None
    )
    settings = {"max_steps": STEPS, "per_device_train_batch_size": 8, "learning_rate": 0.01, "shared_prefix": mode}
    torch.manual_seed(0)
    made = core.trainer(
        core.config(folder / mode, **{**settings, **changes}), train_dataset=core.dataset(64), peft_config=peft
    )
    seen = spied(made)
    start = core.weights(made.model)
    made.train()
    packed = {gradient for gradient, one in seen if one}
    assert packed == ({True, False} if mode == "on" else set())
    assert mode == "off" or not [one for one in seen if one == (True, False)], "a pass of the policy was not packed"
    assert core.distance(start, core.weights(made.model)) > 1e-3
    return made, start


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"objective": "grpo", "num_iterations": 2, "beta": 0.05}, id="grpo", marks=pytest.mark.slow),
        pytest.param({"objective": "srpo"}, id="srpo"),
        pytest.param(
            {"objective": "srpo", "lora": True, "gradient_accumulation_steps": 2, "gradient_checkpointing": True},
            id="srpo_lora",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"objective": "sdpo", "distillation_mode": "sampled_token", "distillation_alpha": 1.0},
            id="sdpo",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_twenty_steps_end_in_the_same_weights(tmp_path: Path, changes: dict[str, Any]) -> None:
    plain, start = run(tmp_path, "off", **changes)
    shared, _ = run(tmp_path, "on", **changes)
    moved = core.distance(start, core.weights(plain.model))
    assert core.distance(core.weights(plain.model), core.weights(shared.model)) <= 1e-5 * max(moved, 1.0)
    for name in (
        "loss",
        "grad_norm",
        "entropy",
        "srpo/distilled_share",
        "srpo/gradient_share",
        "srpo/teacher_entropy",
    ):
        expected = core.logged(plain, name)
        assert core.logged(shared, name) == pytest.approx(expected, rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize("replay", ["R3", pytest.param("R2", marks=pytest.mark.slow)])
def test_experts_that_were_chosen_earlier_are_replayed(tmp_path: Path, replay: str) -> None:
    found = []
    for mode in ("off", "on"):
        made = moe.made(
            tmp_path / mode, routing_replay=replay, shared_prefix=mode, routing_replay_metrics_steps=1, max_steps=6
        )
        seen = spied(made)
        made.train()
        assert any(packed for _, packed in seen) is (mode == "on")
        found.append(made)
    plain, shared = found
    assert core.distance(core.weights(plain.model), core.weights(shared.model)) <= 1e-4
    names = {name for entry in plain.state.log_history for name in entry if "rout" in name or "flip" in name}
    assert names
    for name in names | {"loss"}:
        assert core.logged(shared, name) == pytest.approx(core.logged(plain, name), rel=1e-3, abs=1e-5), name
