"""Every checkpoint of a run says how its policy was trained, so that it can be put to work as it lies there."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import step_helpers as steps
from agent_helpers import SETTINGS, scripted_pool
from core_helpers import config
from datasets import Dataset

from routers.tasks.step_routing.environment import StepRoutingEnvironment
from routers.tasks.step_routing.router import StepRouter
from routers.tasks.think_route.agent import RouterAgent
from srpo.trainer.trainer import SRPOTrainer

STEPS = steps.settings("progress")


def read_agent(folder: Path) -> RouterAgent:
    return RouterAgent.from_pretrained(folder, scripted_pool())


@pytest.mark.parametrize(("settings", "read"), [(STEPS, StepRouter.from_pretrained), (SETTINGS, read_agent)])
def test_a_checkpoint_can_be_used_as_it_lies_there(settings: Any, read: Callable[[Path], Any], tmp_path: Path) -> None:
    executors = [steps.Walker("explorer", 0.0001, "one"), steps.Walker("planner", 0.0024, "two")]
    model, tokenizer = steps.policy()
    world = StepRoutingEnvironment(lambda row: steps.Corridor(3), executors, STEPS.style.describe, labels=STEPS.labels)
    saving = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2, "max_completion_length": 200}
    trainer = SRPOTrainer(
        model,
        lambda completions, **_: [float(i % 2) for i in range(len(completions))],
        config(tmp_path, objective="grpo", per_device_train_batch_size=4, **saving),
        Dataset.from_list([{"prompt": [{"role": "user", "content": "walk"}]}] * 4),
        processing_class=tokenizer,
        environment=world,
    )
    trainer.save_beside = settings.save
    trainer.train()
    trainer.save_model()
    for folder in (tmp_path / "checkpoint-1", tmp_path / "checkpoint-2", tmp_path):
        with read(folder) as router:
            assert router.settings == settings
