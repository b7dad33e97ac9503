"""The experts of a saved mixture of experts come back, which transformers' own loading of a checkpoint leaves out."""

import torch
from core_helpers import config, equal, model, trainer, weights
from replay_cases import moe, reward

from srpo.trainer.checkpoint import load_renamed_weights, saved_names


def test_the_experts_come_back(tmp_path):
    saved, other = moe(seed=0), moe(seed=1)
    saved.save_pretrained(tmp_path)
    assert saved_names(tmp_path) - other.state_dict().keys(), "transformers saves experts as it trains them now"
    load_renamed_weights(other, str(tmp_path))
    assert equal(weights(saved), weights(other))


def test_a_checkpoint_in_pieces(tmp_path):
    saved, other = moe(seed=0), moe(seed=1)
    saved.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    load_renamed_weights(other, str(tmp_path))
    assert equal(weights(saved), weights(other))


def test_other_folders_are_left_to_transformers(tmp_path):
    network = model()
    network.save_pretrained(tmp_path)
    with torch.no_grad():
        network.lm_head.weight.add_(1.0)
    before = weights(network)
    load_renamed_weights(network, str(tmp_path))  # no name differs, so everything was loaded already
    load_renamed_weights(network, str(tmp_path / "nothing"))
    assert equal(before, weights(network))


def test_the_best_model_has_its_experts(tmp_path):
    """The best of the start and two steps is forced to be the first step; its weights must be those at the end."""
    args = config(
        tmp_path, objective="grpo", max_steps=2, save_strategy="steps", save_steps=1, eval_strategy="steps",
        eval_steps=1, load_best_model_at_end=True, metric_for_best_model="eval_reward", greater_is_better=True,
        per_device_eval_batch_size=4, do_eval=True,
    )  # fmt: skip
    run = trainer(args, moe(), reward, eval_dataset=trainer_rows())
    evaluate, ends = run.evaluate, []

    def scored(*args, **kwargs):
        ends.append(weights(run.model))
        return {**evaluate(*args, **kwargs), "eval_reward": 100.0 if len(ends) == 2 else -100.0}

    run.evaluate = scored
    run.train()
    assert len(ends) == 3 and not equal(*ends[1:])
    assert run.state.best_model_checkpoint.endswith("checkpoint-1")
    assert equal(weights(run.model), ends[1])


def trainer_rows():
    from core_helpers import dataset

    return dataset(4)
