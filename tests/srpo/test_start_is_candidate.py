"""With load_best_model_at_end, a training that only makes the policy worse ends with what it began with."""

from itertools import count

import pytest
import torch
from core_helpers import config, model, trainer


def trained(folder, earned, **changes):
    network = model()
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    every = {"strategy": "steps", "steps": 1}
    chosen = {f"{kind}_{name}": value for kind in ("eval", "save") for name, value in every.items()}
    values = map(earned, count())
    args = config(folder, max_steps=2, load_best_model_at_end=True, save_total_limit=1, **{**chosen, **changes})
    built = trainer(args, network, heldout=lambda: {"reward": next(values)})
    built.train()
    same = all(torch.equal(p, before[name]) for name, p in built.model.named_parameters())
    return built, same


@pytest.mark.parametrize("change", [{}, {"save_strategy": "best"}])
def test_the_start_is_what_is_left_of_a_training_that_only_lost(tmp_path, change):
    built, same = trained(tmp_path, lambda n: 0.5 - 0.1 * n, **change)
    assert same and built.state.best_model_checkpoint == str(tmp_path / "checkpoint-0")
    assert built.state.best_metric == 0.5
    assert [e["eval_reward"] for e in built.state.log_history if "eval_reward" in e] == [0.5, 0.4, 0.3]


def test_a_training_that_wins_ends_with_its_best_step(tmp_path):
    built, same = trained(tmp_path, lambda n: -abs(n - 1))
    assert not same and built.state.best_model_checkpoint == str(tmp_path / "checkpoint-1")
    assert not (tmp_path / "checkpoint-0").exists(), "only the best and the newest are kept"
