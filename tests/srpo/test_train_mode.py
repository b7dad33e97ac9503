"""Dropout and its kin: off by default, in every place it can come from; else said, with its figure."""

import re

import pytest
import torch
from core_helpers import config, logged, model, tokenizer, trainer
from peft import LoHaConfig, LoraConfig, get_peft_model
from test_positions import network

from srpo.trainer.forward_checks import pass_noise, still

LORA = {"r": 4, "lora_alpha": 64, "target_modules": "all-linear"}


def peft_policy(**options):
    return get_peft_model(model(), LoraConfig(**LORA, init_lora_weights=False, **options))


CASES = {
    "lora": lambda: peft_policy(lora_dropout=0.1),
    "loha": lambda: get_peft_model(
        model(), LoHaConfig(r=4, target_modules=["q_proj"], rank_dropout=0.3, init_weights=False)
    ),
    "attention": lambda: _with(model(), attention_dropout=0.2),
    "embeddings and residuals": lambda: network("GPT2", resid_pdrop=0.2, embd_pdrop=0.2, attn_pdrop=0.2),
    "functional": lambda: network("OPT", dropout=0.2, attention_dropout=0.2),
    "whole layers": lambda: network("OPT", num_hidden_layers=3, dropout=0.0, layerdrop=0.5),
    "mpt": lambda: _with(network("Mpt"), hidden_dropout=0.2, attn_dropout_p=0.2),
}


def _with(network, **rates):
    for module in network.modules():
        for name, rate in rates.items():
            if hasattr(module, name):
                setattr(module, name, rate)
    return network


@pytest.mark.parametrize("case", CASES)
def test_every_kind_is_found_and_switched_off(case):
    policy = CASES[case]().train()
    base = policy.get_base_model() if hasattr(policy, "get_base_model") else policy
    before = 0.0
    for seed in range(4):
        torch.manual_seed(seed)
        before = max(before, pass_noise(policy, base))
    state = torch.get_rng_state()
    assert before > 1e-3, "without noise there is nothing to switch off"
    found = still(policy)
    assert found and max(found.values()) > 0
    assert pass_noise(policy, base) == 0.0 and policy.training
    assert torch.equal(state, torch.get_rng_state())


def same_context(folder, policy, **changes):
    """Gradient norm of a teacher that sees exactly what the student sees: nothing is to be learnt."""
    args = config(
        folder, objective="sdpo", teacher_model_kind="frozen", max_grad_norm=1e9, learning_rate=0.0,
        reprompt_template="{prompt}", solution_template="{successful_previous_attempt}", **changes,
    )  # fmt: skip
    made = trainer(args, policy)
    made.train()
    return logged(made, "grad_norm")[0], logged(made, "loss/sdpo")[0]


@pytest.mark.parametrize("case", ["lora", "attention"])
def test_a_teacher_with_the_same_context_teaches_nothing(tmp_path, case, monkeypatch):
    """40 % of the real gradient at LoRA dropout 0.05 and 46 % at attention dropout 0.1, on a20621b."""
    monkeypatch.setattr("srpo.trainer.distiller.teacher_prompt_ids", lambda told, *_: _tokenized([t[0] for t in told]))
    norm, loss = same_context(tmp_path, CASES[case]())
    assert loss == pytest.approx(0.0, abs=1e-6) and norm < 1e-4
    norm, loss = same_context(tmp_path, CASES[case](), disable_dropout=False)
    assert loss > 1e-4


def _tokenized(prompts):
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
    return tokenizer().apply_chat_template(prompts, **options)["input_ids"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, None),
        ({"disable_dropout": False}, "nats on average.*Set disable_dropout: true"),
        ({"neftune_noise_alpha": 50.0}, "disable_dropout does not reach it .neftune_noise_alpha"),
    ],
)
def test_noise_that_is_left_is_said_with_its_figure(tmp_path, monkeypatch, changes, said):
    heard = []
    monkeypatch.setattr("srpo.trainer.forward_checks.logger.warning", lambda text, *args: heard.append(text % args))
    made = trainer(config(tmp_path, objective="srpo", **changes), CASES["lora"]())
    made.train()
    assert len(heard) == (said is not None)
    assert said is None or re.search(said, heard[0])


@pytest.mark.parametrize("objective", ["grpo", "srpo"])
def test_old_and_reference_are_those_of_the_same_pass(tmp_path, objective):
    """With dropout the first ratio was not 1 and the first penalty not 0."""
    made = trainer(config(tmp_path, objective=objective, beta=0.1, num_iterations=2, max_steps=1), CASES["lora"]())
    made.train()
    assert (logged(made, "kl") or logged(made, "loss/kl"))[0] == pytest.approx(0.0, abs=1e-7)
    assert made.args.disable_dropout
