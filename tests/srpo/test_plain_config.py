"""A TRL user changes the import and one line: TRL's own config, every loss type, and names that can be listed."""

import logging

import pytest
import trl
from core_helpers import TRLInOurOrder, config, dataset, logged, model, scripted, tokenizer, trainer, weights
from transformers import TrainingArguments
from trl.experimental.gmpo import GMPOConfig

import routers
import srpo
from srpo import GRPOTrainer, SDPOTrainer, SRPOConfig, SRPOTrainer
from srpo.recipe import RecipeError, load_recipe

LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo")
SHARED = {
    "use_cpu": True, "bf16": False, "report_to": [], "max_steps": 2, "per_device_train_batch_size": 16,
    "num_generations": 4, "max_completion_length": 8, "optim": "sgd", "learning_rate": 0.1, "num_iterations": 2,
    "gradient_checkpointing": False, "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1,
}  # fmt: skip


def reward(completion_ids, **_):
    return [0.1 * (sum(ids) % 7) for ids in completion_ids]


def run(cls, args):
    made = cls(model(), reward, args, dataset(), processing_class=tokenizer(), rollout_func=scripted)
    made.train()
    return made


@pytest.mark.parametrize("loss", LOSSES)
def test_trls_config_and_ours_train_what_trl_trains(tmp_path, loss):
    """Bit for bit, and sums have equal bits in one order only: so TRL gets its rows in our micro-batches."""
    settings = {"output_dir": str(tmp_path), "loss_type": loss, **SHARED}
    reference = run(TRLInOurOrder, trl.GRPOConfig(**settings))
    plain = run(GRPOTrainer, trl.GRPOConfig(**settings))
    trls = {"scale_rewards": "group", "epsilon_high": None}  # where our defaults are others
    ours = run(GRPOTrainer, SRPOConfig(**settings, **trls, log_completions=False))
    start, end = weights(model()), weights(reference.model)
    assert any(not start[name].equal(end[name]) for name in start)
    for made in (plain, ours):
        assert made.args.objective == "grpo" and made.args.loss_type == loss
        assert all(end[name].equal(value) for name, value in weights(made.model).items())
        assert logged(made, "loss") == logged(reference, "loss")


def test_the_users_config_stays_and_its_values_hold(tmp_path, caplog):
    logging.getLogger("srpo").propagate = True
    args = trl.GRPOConfig(output_dir=str(tmp_path), **SHARED)
    before = args.to_dict()
    with caplog.at_level(logging.WARNING):
        made = run(SRPOTrainer, args)
    assert (made.args.objective, made.args.scale_rewards) == ("srpo", "group")
    assert made.args.teacher_update_rate == 0.05  # ours, where TRL has no such field
    assert any("scale_rewards='group', epsilon_high=None" in r.getMessage() for r in caplog.records)
    assert args.to_dict() == before and type(args) is trl.GRPOConfig
    assert run(SDPOTrainer, args).args.objective == "sdpo"


@pytest.mark.parametrize("kind", [GMPOConfig, trl.SFTConfig, TrainingArguments])
def test_configs_of_other_trainers_are_refused(tmp_path, kind):
    args = kind(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=[])
    for cls in (SRPOTrainer, GRPOTrainer):
        with pytest.raises(TypeError, match=f"{kind.__name__} is of another trainer"):
            trainer(args, cls=cls)


def test_settings_of_trls_loss_need_the_grpo_objective(tmp_path):
    args = config(tmp_path, loss_type="dr_grpo")
    with pytest.raises(ValueError, match="loss_type='dr_grpo' acts inside TRL's own loss"):
        trainer(args)
    with pytest.raises(ValueError, match="loss_type='dr_grpo' acts inside TRL's own loss"):
        config(tmp_path, loss_type="dr_grpo", objective="srpo")
    recipe = ["--output_dir", str(tmp_path), "--use_cpu", "true", "--bf16", "false", "--loss_type", "dr_grpo"]
    with pytest.raises(RecipeError, match="objective: grpo"):  # nobody else will say which objective it is
        load_recipe(SRPOConfig, recipe)
    assert config(tmp_path).objective == "srpo"


def test_lazy_names_are_listed():
    assert set(srpo.__all__) <= set(dir(srpo)) and {"SRPOTrainer", "GRPOTrainer"} <= set(dir(srpo))
    assert set(routers.__all__) <= set(dir(routers))
