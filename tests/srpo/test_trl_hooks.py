"""What the trainer core takes for granted in TRL and transformers. A failure here says which hook has moved.

The core overrides private methods of `trl.GRPOTrainer`, so it is tied to one minor version. When that version moves,
read each failing line as: this is what changed, adapt srpo/trainer/trainer.py, then this file.
"""

import ast
import inspect
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import trl
from core_helpers import config, dataset, trainer
from transformers import Trainer
from trl import chat_template_utils
from trl.trainer import utils
from trl.trainer.callbacks import SyncRefModelCallback

import srpo
from srpo.config import SRPOConfig
from srpo.hub.hub import HubMixin
from srpo.objectives.batch import TRL_LOSS_ONLY
from srpo.teacher.lm_head import PolicyOutput
from srpo.trainer.named import BoPOTrainer, GRPOTrainer, SDPOTrainer
from srpo.trainer.trainer import SRPOTrainer

PARAMETERS = {
    "__init__": "model reward_funcs args train_dataset eval_dataset processing_class reward_processing_classes "
    "callbacks optimizers quantization_config peft_config tools rollout_func environment_factory",
    "_calculate_rewards": "inputs prompts completions completion_ids_list",
    "_generate_and_score_completions": "inputs",
    "_generate_single_turn": "prompt_ids images multimodal_fields num_generations has_tool_images",
    "_get_per_token_logps_and_entropies": "model input_ids attention_mask logits_to_keep batch_size compute_entropy "
    "compute_aux_loss pixel_values image_grid_thw num_images pixel_attention_mask spatial_shapes num_tiles "
    "image_sizes token_type_ids mm_token_type_ids image_position_ids",
    "compute_loss": "model inputs return_outputs num_items_in_batch",
    "_compute_loss": "model inputs",
    "save_model": "output_dir _internal_call",
    "_get_train_sampler": "dataset",
    "_load_best_model": "",
    "_log_completion_extra": "column values",
    "_log_metric": "name value",
    "_load_from_checkpoint": "resume_from_checkpoint model",
    "_load_optimizer_and_scheduler": "checkpoint",
    "_save": "output_dir state_dict",
    "_save_checkpoint": "model trial",
    "log": "logs start_time",
    "training_step": "model inputs num_items_in_batch",
    "_generate": "prompts",
    "_get_output_dir": "trial",
    "_get_grad_norm": "model grad_norm",
    "_determine_best_metric": "metrics trial",
    "_prepare_inputs": "generation_batch",
    "_tokenize_prompts": "prompts",
}
ANY = ("train", "evaluate")
"""Overridden with whatever arguments they are called with, but for the first."""
HUB = ("create_model_card", "init_hf_repo", "push_to_hub", "_push_from_checkpoint", "_finish_current_push")
OVERRIDDEN = (
    "_calculate_rewards",
    "_generate_and_score_completions",
    "_generate",
    "_generate_single_turn",
    "_get_per_token_logps_and_entropies",
    "compute_loss",
    "_compute_loss",
    "_get_grad_norm",
    "_get_output_dir",
    "_get_train_sampler",
    "_prepare_inputs",
    "_tokenize_prompts",
    "_load_best_model",
    "_log_completion_extra",
    "_log_metric",
    "_load_from_checkpoint",
    "_load_optimizer_and_scheduler",
    "_save",
    "_save_checkpoint",
    "log",
    "save_model",
    "training_step",
)


def test_how_calls_are_read_is_known_by_the_chat_template_alone():
    """routers.language.calls asks for it without giving TRL a tokenizer, which it would write into."""
    known = SimpleNamespace(chat_template=chat_template_utils.llama3_1_chat_template)
    assert chat_template_utils.add_response_schema(known).response_template is chat_template_utils.llama3_template
    with pytest.raises(ValueError, match="Unrecognized chat template"):
        chat_template_utils.add_response_schema(SimpleNamespace(chat_template="another"))
    assert chat_template_utils.qwen3_template["fields"]["tool_calls"]["open"] == "<tool_call>"  # Hermes


def test_the_trl_series_is_the_one_declared():
    assert trl.__version__.split(".")[:2] == srpo.TRL_SERIES.split(".")


@pytest.mark.parametrize("name", PARAMETERS)
def test_signatures(name):
    found = list(inspect.signature(getattr(trl.GRPOTrainer, name)).parameters)[1:]
    assert found == PARAMETERS[name].split()


@pytest.mark.parametrize("cls", [SRPOTrainer, GRPOTrainer, SDPOTrainer, BoPOTrainer])
def test_between_a_trainer_and_trl_s_stands_one_class_of_one_rule(cls):
    """Nothing else to put into another order: the Hub's methods are no one else's."""
    ours = [c for c in cls.__mro__ if c.__module__.startswith("srpo.")]
    assert ours[-2:] == [SRPOTrainer, HubMixin] and cls.__mro__[len(ours)] is trl.GRPOTrainer
    for thin in ours[:-2]:  # classes that only name an objective
        assert {name for name, value in vars(thin).items() if inspect.isfunction(value)} <= {"__init__"}
    assert not functions(SRPOTrainer) & functions(HubMixin)


def functions(cls):
    return {name for name, value in vars(cls).items() if callable(value) or isinstance(value, property)} - {"__doc__"}


def test_no_other_method_of_trl_is_overridden():
    """A new override belongs into this file. All classes and all modules of ours, whatever they are called."""
    wanted = {SRPOTrainer: {*OVERRIDDEN, *ANY, "__init__"}, HubMixin: set(HUB)}
    for cls, names in wanted.items():
        assert {name for name in functions(cls) if hasattr(trl.GRPOTrainer, name)} == names
    for cls in SRPOTrainer.__mro__:
        assert not cls.__module__.startswith("srpo.") or cls in wanted


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_overrides_take_what_trl_passes(name):
    assert name in vars(SRPOTrainer)
    theirs = inspect.signature(getattr(trl.GRPOTrainer, name))
    ours = inspect.signature(getattr(SRPOTrainer, name))
    ours.bind(*[None] * len(theirs.parameters))
    ours.bind(None, **dict.fromkeys(list(theirs.parameters)[1:]))


def test_the_loss_owns_the_accumulation_scaling():
    assert trl.GRPOTrainer.loss_is_scaled_for_ga is True
    assert "loss_is_scaled_for_ga" in inspect.getsource(Trainer)


def test_the_batch_dict(tmp_path):
    """Keys, shapes and dtypes that branches and loss read, for one process."""
    made = trainer(config(tmp_path, objective="grpo", beta=0.0, num_iterations=2))
    made.model.train()
    batch = made._generate_and_score_completions([row for row in dataset().select(range(4)) for _ in range(4)])
    ids, mask = batch["completion_ids"], batch["completion_mask"]
    assert ids.shape == mask.shape and ids.shape[0] == 16
    assert batch["prompt_ids"].shape == batch["prompt_mask"].shape
    assert batch["advantages"].shape == (16,)
    assert batch["num_items_in_batch"].ndim == 0 and batch["num_items_in_batch"] == mask.sum()
    assert batch["old_per_token_logps"].shape == ids.shape
    assert (mask[:, 1:] <= mask[:, :-1]).all(), "completions are padded on the right"
    assert (batch["prompt_mask"][:, 1:] >= batch["prompt_mask"][:, :-1]).all(), "prompts are padded on the left"
    source = inspect.getsource(trl.GRPOTrainer._generate_and_score_completions)
    for key in ("importance_sampling_ratio", "ref_per_token_logps", "tool_mask"):
        assert f'output["{key}"]' in source, f"TRL no longer returns {key}"


def test_the_old_policy_is_scored_first_and_when_we_think():
    """Routing replay takes the first scoring pass of a batch for the old policy's, under this condition."""
    source = inspect.getsource(trl.GRPOTrainer._generate_and_score_completions)
    assert source.count("self._get_per_token_logps_and_entropies(") == 3
    assert source.index("old_per_token_logps, _, _ = self.") < source.index("ref_per_token_logps, _, _ = self.")
    condition = """if self.args.gradient_accumulation_steps % generate_every != 0 or (
                self.use_vllm and self.vllm_importance_sampling_correction
            ):"""
    assert condition in source, "srpo.replay.settings.has_old_logprobs repeats this condition"


def test_rewards_are_gathered_and_per_function(tmp_path):
    functions = [lambda completions, **_: [None] * 2, lambda completions, **_: [1.0, 0.5]]
    made = trainer(config(tmp_path, objective="grpo"), rewards=functions)
    row = [{"role": "user", "content": "x"}]
    done = [[{"role": "assistant", "content": "y"}]] * 2
    found = made._calculate_rewards([{"prompt": row}] * 2, [row] * 2, done, [[5], [6]])
    assert found.shape == (2, 2) and torch.isnan(found[:, 0]).all() and found[:, 1].tolist() == [1.0, 0.5]


def test_shuffling_and_splitting_keep_lists_and_scalars():
    torch.manual_seed(0)
    hidden = [torch.tensor(i) if i % 2 else None for i in range(4)]
    batch = {"ids": torch.arange(4), "hidden": hidden, "n": torch.tensor(3)}
    shuffled = utils.shuffle_sequence_dict(batch)
    assert shuffled["ids"].tolist() != [0, 1, 2, 3]
    parts = utils.split_tensor_dict(shuffled, 2)
    for part in parts:
        assert part["n"] == 3
        for i, h in zip(part["ids"].tolist(), part["hidden"], strict=True):
            assert h is None if i % 2 == 0 else h == i


def test_what_prepare_inputs_does_in_training():
    """Ours does the same with another split; TRL's own stays in use for pictures and in evaluation."""
    source = inspect.getsource(trl.GRPOTrainer._prepare_inputs)
    for line in (
        "generate_every = self.args.steps_per_generation * self.num_iterations",
        "if self._step % generate_every == 0 or self._buffered_inputs is None:",
        "generation_batch = shuffle_sequence_dict(generation_batch)",
        "generation_batches = split_tensor_dict(generation_batch, self.args.steps_per_generation)",
        "inputs = self._buffered_inputs[self._step % self.args.steps_per_generation]",
    ):
        assert line in source


def test_attributes_of_a_trainer(tmp_path):
    made = trainer(config(tmp_path))
    for name in (
        *("_step", "_buffered_inputs", "_metrics", "_logs", "_pending_extra_logs", "_tokenizer", "_is_vlm"),
        *("eos_token_ids", "reward_weights", "num_generations", "temperature", "epsilon_low", "epsilon_high", "beta"),
        *("importance_sampling_level", "aux_loss_enabled", "router_aux_loss_coef", "max_completion_length"),
    ):
        assert hasattr(made, name), name
    assert made._step == 0 and made._buffered_inputs is None
    assert set(made._logs) == {"images", "prompt", "completion", "rewards", "advantages", "extra"}
    sampler = made._get_train_sampler()
    assert isinstance(sampler, utils.RepeatSampler)
    assert sampler.num_samples == 16 and isinstance(sampler.generator, torch.Generator) and sampler.shuffle is True


def test_attributes_the_source_uses_exist(tmp_path):
    """Every `self.x` in the trainer is ours or TRL's: a rename in TRL is named here, not in the middle of a run."""
    made = trainer(config(tmp_path))
    made.current_gradient_accumulation_steps = 1  # set by transformers' loop
    assert "self.current_gradient_accumulation_steps = " in inspect.getsource(Trainer)
    tree = ast.parse(Path(inspect.getsourcefile(SRPOTrainer)).read_text())
    cls = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "SRPOTrainer")
    used = {
        node.attr
        for node in ast.walk(cls)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"
    }
    with_vllm = {"vllm_generation", "_last_loaded_step"}
    assert all(f"self.{name} = " in inspect.getsource(trl.GRPOTrainer.__init__) for name in with_vllm)
    assert not [name for name in used - with_vllm if not hasattr(made, name)]


def test_the_sampler_draws_one_permutation_per_epoch():
    """The resume clock replays it: epoch e is the e-th `randperm` of the generator."""
    sampler = utils.RepeatSampler(range(5), mini_repeat_count=1, batch_size=1, seed=3)
    epochs = [list(sampler), list(sampler)]
    generator = torch.Generator().manual_seed(3)
    assert epochs == [torch.randperm(5, generator=generator).tolist() for _ in range(2)]


def test_the_fused_output():
    names = [field.name for field in fields(utils.FusedCausalLMOutput)]
    assert names == [
        *("loss", "log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1", "label_mask", "aux_loss")
    ]
    assert [field.name for field in fields(PolicyOutput)] == [*names, "divergence"]
    assert "outputs" in inspect.signature(utils.add_fused_lm_head).parameters
    source = inspect.getsource(utils.add_fused_lm_head)
    for name in ("final_logit_softcapping", "logit_scale", "output_multiplier", "lm_head_multiplier"):
        assert name in source and "logits_scaling" in source, f"srpo.teacher.lm_head.head_of still reads {name}"
    assert 'outputs=("log_probs", "entropy")' in inspect.getsource(trl.GRPOTrainer.__init__)


def test_helpers_that_the_teacher_uses():
    sync = inspect.signature(SyncRefModelCallback.sync_target_model)
    assert list(sync.parameters) == ["model", "target_model", "alpha"]
    assert next(iter(inspect.signature(utils.create_model_from_path).parameters)) == "model_id"
    assert callable(utils.maybe_gather_lm_head_ctx) and callable(utils.pad)


def test_config_fields():
    theirs = {field.name: field for field in fields(trl.GRPOConfig)}
    for name, neutral in TRL_LOSS_ONLY.items():
        assert theirs[name].default == neutral, f"{name} has another neutral value in TRL now"
    assert {"scale_rewards", "epsilon_high", "vllm_importance_sampling_mode", "steps_per_generation"} <= set(theirs)
    ours = {field.name for field in fields(SRPOConfig)} - set(theirs)
    assert {"objective", "teacher_model_kind", "distillation_topk"} <= ours, "TRL has a field of the same name now"
