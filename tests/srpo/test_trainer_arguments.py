"""Arguments as in TRL, mistakes named in words, and batches with nothing in them."""

import copy
import inspect

import pytest
import torch
import trl
from core_helpers import (
    LENGTH,
    binary_reward,
    config,
    dataset,
    distance,
    equal,
    logged,
    model,
    scripted,
    tokenizer,
    trainer,
    weights,
)
from peft import LoraConfig
from transformers import PreTrainedTokenizerFast, ProcessorMixin

from srpo.config import SRPOConfig
from srpo.trainer.named import GRPOTrainer, SDPOTrainer
from srpo.trainer.trainer import SRPOTrainer

# ---------------------------------------------------------------------------------------------- TRL's signature


@pytest.mark.parametrize(("cls", "objective"), [(SRPOTrainer, "srpo"), (SDPOTrainer, "sdpo"), (GRPOTrainer, "grpo")])
def test_positional_arguments_are_those_of_trl(tmp_path, cls, objective):
    lora = LoraConfig(r=4, target_modules="all-linear")
    order = list(inspect.signature(trl.GRPOTrainer).parameters)
    values = {
        "model": model(),
        "reward_funcs": binary_reward,  # one function, not in a list
        "args": config(tmp_path),
        "train_dataset": dataset(),
        "eval_dataset": dataset(4),
        "processing_class": tokenizer(),
        "optimizers": (None, None),
        "peft_config": lora,
        "rollout_func": scripted,
    }
    made = cls(*(values.get(name) for name in order))
    assert made.objective == objective and made.args.objective == objective
    assert len(made.eval_dataset) == 4 and made.rollout_func is scripted
    assert made.reward_func_names == ["binary_reward"]
    assert (made.teacher is None) is (objective == "grpo")
    assert made.teacher is None or made.teacher.weights is not None, "a positional peft_config was not seen"
    made.train()


def test_our_own_arguments_are_by_keyword_and_unknown_ones_are_named(tmp_path):
    own = ("world", "correctness", "recipe")
    parameters = inspect.signature(SRPOTrainer).parameters
    assert all(parameters[name].kind is inspect.Parameter.KEYWORD_ONLY for name in own)
    with pytest.raises(TypeError, match="wolrd"):
        trainer(config(tmp_path), wolrd=None)


@pytest.mark.parametrize("objective", ["sdpo", "srpo"])
def test_a_policy_by_its_path(tmp_path, objective):
    model().save_pretrained(tmp_path / "policy")
    tokenizer().save_pretrained(tmp_path / "policy")
    args = config(tmp_path, objective=objective, model_init_kwargs={"dtype": "float32"})
    made = SRPOTrainer(str(tmp_path / "policy"), binary_reward, args, dataset(), rollout_func=scripted)
    assert args.model_init_kwargs == {"dtype": "float32"}, "the caller's settings must not change"
    start = weights(model())
    assert equal(weights(made.model), start) and equal(weights(made.teacher.model), start)
    made.train()
    same = trainer(config(tmp_path, objective=objective))
    same.train()
    assert equal(weights(made.model), weights(same.model)) and not equal(weights(made.model), start)


def test_a_reference_penalty_goes_with_srpo(tmp_path):
    model().save_pretrained(tmp_path / "policy")
    tokenizer().save_pretrained(tmp_path / "policy")
    ends = []
    for beta in (0.0, 0.5):
        args = config(tmp_path, beta=beta, max_steps=2, model_init_kwargs={"dtype": "float32"})
        made = SRPOTrainer(str(tmp_path / "policy"), binary_reward, args, dataset(), rollout_func=scripted)
        made.train()
        ends.append(weights(made.model))
    assert logged(made, "loss/kl")[0] == pytest.approx(0.0, abs=1e-7) and logged(made, "loss/kl")[1] > 0
    assert distance(*ends) > 1e-6


# --------------------------------------------------------------------------------------------- mistakes in words


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"objective": "dpo"}, "objective='dpo' is not one of grpo, sdpo, srpo"),
        ({"teacher_model_kind": "base"}, "is not one of ema, trust_region, frozen, live"),
        ({"distillation_mode": "topk"}, "is not one of topk_logits, full_logits, sampled_token"),
        ({"demonstration": "shortest"}, "is not one of first, random, best"),
        ({"distillation_aggregation": "mean"}, "is not one of token, sequence_mean"),
        ({"teacher_update_rate": 1.5}, r"teacher_update_rate=1.5: must be in \[0, 1\]"),
        ({"distillation_alpha": -0.1}, r"distillation_alpha=-0.1: must be in \[0, 1\]"),
        ({"distillation_topk": 0}, "distillation_topk=0"),
        ({"entropy_weight_beta": -1.0}, "entropy_weight_beta=-1.0: must be at least 0"),
        ({"distillation_mode": "sampled_token"}, "set distillation_alpha: 1.0"),
        ({"reprompt_template": "{question}"}, r"lacks its slot \{prompt\}"),
        ({"solution_template": "x"}, "successful_previous_attempt"),
        ({"feedback_template": "x"}, "feedback_raw"),
        ({"objective": "srpo", "loss_type": "cispo"}, "loss_type='cispo' acts inside TRL's own loss"),
        ({"objective": "srpo", "steps_per_generation": 1, "gradient_accumulation_steps": 2}, "must be a multiple of"),
        ({"objective": "srpo", "steps_per_generation": 3, "gradient_accumulation_steps": 2}, "must be a multiple of"),
        ({"objective": "sdpo", "beta": 0.1}, "beta=0.1: sdpo has no penalty"),
        ({"objective": "srpo", "top_entropy_quantile": 0.2}, "top_entropy_quantile=0.2 acts inside TRL's own loss"),
    ],
)
def test_settings_that_cannot_be_meant_are_named(tmp_path, change, words):
    with pytest.raises(ValueError, match=words):
        config(tmp_path, **change)


@pytest.mark.parametrize(("name", "value"), [("stop_strings", ["</route>"]), ("max_turns", 2), ("max_cost_usd", 1.0)])
def test_what_only_episodes_read_is_refused_without_an_environment(tmp_path, name, value):
    with pytest.raises(ValueError, match=f"{name}=.* read by the episodes of an environment only"):
        trainer(config(tmp_path, **{name: value}))


def test_settings_are_checked_again_where_the_trainer_class_changes_the_objective(tmp_path):
    args = config(tmp_path, objective="grpo", loss_type="cispo")
    with pytest.raises(ValueError, match="loss_type='cispo'"):
        trainer(args, cls=SDPOTrainer)


@pytest.mark.parametrize(
    ("alpha", "said"),
    [(0.0, None), (1e-4, "0"), (0.009, "0"), (0.01, None), (0.5, None), (0.99, None), (0.995, "1"), (1.0, None)],
)
def test_an_alpha_next_to_an_end_is_warned_of(tmp_path, monkeypatch, alpha, said):
    heard = []
    monkeypatch.setattr("srpo.config.logger.warning_once", heard.append)
    config(tmp_path, distillation_alpha=alpha)
    assert len(set(heard)) == (said is not None)
    assert said is None or f"set exactly {said}," in heard[0]
    heard.clear()
    config(tmp_path, distillation_alpha=alpha, objective="grpo")  # distils nothing
    assert not heard
    assert "Not continuous" in SRPOConfig.__dataclass_fields__["distillation_alpha"].metadata["help"]


def test_an_unknown_setting_is_named(tmp_path):
    with pytest.raises(TypeError, match="objektive"):
        config(tmp_path, objektive="srpo")


def test_a_world_must_answer_once_per_completion(tmp_path):
    made = trainer(config(tmp_path), world=lambda rows, texts: {"route": ["a"] * 3})
    with pytest.raises(ValueError, match="returned 3 values in column 'route' for 16 completions"):
        made.train()


@pytest.mark.parametrize("name", ["binary_reward", "prompt", "branch"])
def test_a_world_must_not_hide_a_column_of_the_table(tmp_path, name):
    made = trainer(config(tmp_path), world=lambda rows, texts: {name: [0.0] * len(texts)})
    with pytest.raises(ValueError, match=f"column '{name}' has a name that the completions table uses"):
        made.train()


def test_feedback_from_rewards_must_be_one_per_completion(tmp_path):
    def reward(completions, log_extra, **_):
        log_extra("feedback", ["no"])
        return [0.0] * len(completions)

    with pytest.raises(ValueError, match="'feedback' got 1 values for 16 completions"):
        trainer(config(tmp_path), rewards=[reward, binary_reward]).train()


def test_the_seed_decides_everything(tmp_path):
    def run(seed):
        made = trainer(config(tmp_path, seed=seed, max_steps=2, optim="adamw_torch"), rollout_func=None)
        made.train()
        return weights(made.model)

    assert equal(run(1), run(1)) and not equal(run(1), run(2))


def test_vision_language_models_are_refused(tmp_path):
    class Processor(ProcessorMixin):
        def __init__(self, tokenizer: PreTrainedTokenizerFast):
            self.tokenizer = tokenizer

    network = model()
    network.config.image_token_id = 5  # TRL asks every vision-language model for it
    with pytest.raises(ValueError, match="objective: srpo trains text models only"):
        SRPOTrainer(network, binary_reward, config(tmp_path), dataset(), processing_class=Processor(tokenizer()))


# --------------------------------------------------------------------------------- batches with nothing in them


def scored(made):
    made.current_gradient_accumulation_steps = 1
    made.model.train()
    return made._generate_and_score_completions([dict(row) for row in dataset().select(range(4)) for _ in range(4)])


@pytest.mark.parametrize("objective", ["srpo", "sdpo"])
@pytest.mark.parametrize("mode", ["topk_logits", "sampled_token"])
@pytest.mark.parametrize("emptiness", ["masked", "nothing_distilled"])
def test_an_empty_micro_batch_gives_a_connected_finite_loss(tmp_path, objective, mode, emptiness):
    alpha = 1.0 if mode == "sampled_token" else 0.5
    made = trainer(config(tmp_path, objective=objective, distillation_mode=mode, distillation_alpha=alpha))
    batch = scored(made)
    rows = (~batch["distilled"]).nonzero().flatten()[:2]
    if emptiness == "masked":  # what mask_truncated_completions leaves of a micro-batch
        batch["completion_mask"][rows] = 0
    part = {k: v[rows] if torch.is_tensor(v) and v.ndim else v for k, v in batch.items()}
    if mode == "topk_logits":
        part["teacher_hidden"] = [None] * len(rows)
    loss = made._compute_loss(made.model, part)
    assert loss.requires_grad and torch.isfinite(loss)
    loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in made.model.parameters())
    if emptiness == "masked" or objective == "sdpo":
        assert loss.item() == 0.0 and not any(p.grad.any() for p in made.model.parameters())


def test_a_batch_whose_every_token_is_masked_leaves_the_policy_alone(tmp_path):
    made = trainer(
        config(tmp_path, mask_truncated_completions=True, max_steps=2),
        rollout_func=lambda prompts, t: {
            "prompt_ids": t._tokenize_prompts(prompts)[0],
            "completion_ids": [[70 + i % 3] * LENGTH for i in range(len(prompts))],
            "logprobs": None,
        },
    )
    made.train()
    assert equal(weights(made.model), weights(model())) and logged(made, "loss") == [0.0, 0.0]


def test_tokens_of_others_are_neither_distilled_nor_rewarded(tmp_path):
    """`env_mask` 0: a pool model's reply inside the completion. The teacher reads it; nobody is trained on it."""

    def rollout(prompts, made):
        output = scripted(prompts, made)
        output["env_mask"] = [[int(t % 3 != 1) for t in range(len(ids))] for ids in output["completion_ids"]]
        return output

    made = trainer(config(tmp_path), rollout_func=rollout)
    batch = scored(made)
    others = batch["tool_mask"] == 0
    assert others[batch["distilled"]].any()
    assert batch["distillation_weights"][others].abs().max() == 0
    trained = batch["completion_mask"] * batch["tool_mask"]
    for hidden, row, distilled in zip(batch["teacher_hidden"], trained, batch["distilled"], strict=True):
        assert (hidden.size(0) == row.sum()) if distilled else hidden is None
    assert batch["distilled_tokens"] == trained[batch["distilled"]].sum()
    before = made._compute_loss(made.model, batch).item()
    # The last token of a row conditions nothing else: if it is somebody else's, what it is cannot matter.
    last = trained.size(1) - 1 - batch["completion_mask"].flip(1).argmax(1)
    rows = others[torch.arange(16), last].nonzero().flatten()
    assert len(rows)
    batch["completion_ids"][rows, last[rows]] = 99
    assert made._compute_loss(made.model, batch).item() == pytest.approx(before, rel=1e-6)


# ------------------------------------------------------------------------------------------ ways to run it


def test_bf16_and_gradient_checkpointing(tmp_path):
    made = trainer(config(tmp_path, bf16=True, gradient_checkpointing=True, max_steps=2), model(layers=2))
    plain = trainer(config(tmp_path, max_steps=2), model(layers=2))
    made.train()
    plain.train()
    assert logged(made, "loss") == pytest.approx(logged(plain, "loss"), rel=0.1, abs=0.02)
    assert 0 < distance(weights(made.model), weights(plain.model)) < 0.05


def test_streams_train_too(tmp_path):
    made = trainer(config(tmp_path, max_steps=2), train_dataset=dataset().to_iterable_dataset())
    made.train()
    assert len(logged(made, "srpo/distilled_share")) == 2


def test_evaluation_runs_no_teacher_and_leaves_training_alone(tmp_path):
    straight = trainer(config(tmp_path, max_steps=2, per_device_train_batch_size=8, gradient_accumulation_steps=2))
    straight.train()
    args = config(
        tmp_path,
        max_steps=2,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        eval_strategy="steps",
        eval_steps=1,
        per_device_eval_batch_size=4,
    )
    evaluated = trainer(args, eval_dataset=dataset(4))
    rows, score = [], evaluated.teacher.score

    def spy(ids, mask, length):
        rows.append(evaluated.model.training)
        return score(ids, mask, length)

    evaluated.teacher.score = spy
    evaluated.train()
    assert rows and all(rows), "the teacher ran in evaluation"
    assert len(logged(evaluated, "eval_reward")) == 2
    # Evaluating draws random numbers, so rows meet in other micro-batches; nothing else may differ.
    moved = distance(weights(straight.model), weights(model()))
    assert distance(weights(evaluated.model), weights(straight.model)) <= 1e-5 * moved


def test_prompts_are_those_the_policy_saw(tmp_path):
    """An environment adds its first observation to the prompt; the teacher must see it too."""
    made = trainer(config(tmp_path, objective="sdpo"), rewards=lambda completions, **_: [1.0] * len(completions))
    seen, rows = [], [dict(row) for row in dataset().select(range(4)) for _ in range(4)]
    tokenize, calculate = made._tokenize_prompts, made._calculate_rewards
    made._tokenize_prompts = lambda prompts: seen.extend(p[-1]["content"] for p in prompts) or tokenize(prompts)

    def observed(inputs, prompts, *rest):
        told = copy.deepcopy(prompts)
        for prompt in told:
            prompt[-1]["content"] += " [it rains]"
        return calculate(inputs, told, *rest)

    made._calculate_rewards = observed
    made.model.train()
    batch = made._generate_and_score_completions(rows)
    shown = [text for text in seen if "Correct solution" in text]
    assert len(shown) == int(batch["distilled"].sum()) > 0
    assert all(" [it rains]\nCorrect solution" in text for text in shown)
    assert isinstance(made.args, SRPOConfig)
