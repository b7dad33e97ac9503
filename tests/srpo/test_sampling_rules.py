"""A checkpoint's own generation settings move no sample; `generation_kwargs` that are not scored are refused."""

import copy
import json
import logging

import pytest
import torch
from core_helpers import config, model, tokenizer, trainer
from peft import LoraConfig

from srpo.rollout.generator import TransformersGenerator
from srpo.rollout.sampling_rules import Sampling, own_settings_aside
from srpo.rollout.special_tokens import end_ids
from srpo.rollout.turns import Request

LEAKS = {
    "min_p": 0.99,
    "typical_p": 0.01,
    "epsilon_cutoff": 0.5,
    "eta_cutoff": 0.5,
    "top_k": 1,
    "top_p": 0.001,
    "temperature": 0.01,
    "do_sample": True,
    "suppress_tokens": list(range(20, 280)),
    "begin_suppress_tokens": list(range(20, 280)),
    "forced_bos_token_id": 5,
    "forced_eos_token_id": 6,
    "bad_words_ids": [[i] for i in range(20, 200)],
    "sequence_bias": [[[9], 50.0]],
    "no_repeat_ngram_size": 1,
    "repetition_penalty": 5.0,
    "exponential_decay_length_penalty": (1, 9.0),
    "renormalize_logits": True,
    "remove_invalid_values": True,
    "min_new_tokens": 8,
    "max_new_tokens": 2,
    "max_length": 4,
    "max_time": 1e-9,
    "stop_strings": ["e"],
    "guidance_scale": 3.0,
    "watermarking_config": {"bias": 50.0},
    "num_beams": 3,
    "num_return_sequences": 2,
    "prompt_lookup_num_tokens": 3,
    "penalty_alpha": 0.6,
    "dola_layers": "low",
    "use_cache": False,
    "cache_implementation": "static",
    "return_dict_in_generate": True,
    "token_healing": True,
}


def leaky(network, names=tuple(LEAKS)):
    for name in names:
        setattr(network.generation_config, name, copy.deepcopy(LEAKS[name]))
    return network


def sampled(folder, network, **changes):
    """Completion ids of one generation batch."""
    made = trainer(config(folder, objective="grpo", seed=7), network, rollout_func=None, **changes)
    rows = [made.train_dataset[i] for i in range(4) for _ in range(4)]
    made.model.train()
    torch.manual_seed(3)
    batch = made._generate_and_score_completions(rows)
    return [i[m.bool()].tolist() for i, m in zip(batch["completion_ids"], batch["completion_mask"], strict=True)]


@pytest.mark.parametrize("lora", [False, True])
def test_what_samples_is_what_the_recipe_says(tmp_path, lora):
    peft = {"peft_config": LoraConfig(r=2, target_modules="all-linear")} if lora else {}
    clean = sampled(tmp_path / "clean", model(scale=2.0), **peft)
    assert len({tuple(ids) for ids in clean}) == 16
    network = leaky(model(scale=2.0))
    network.generation_config.pad_token_id = tokenizer().pad_token_id  # TRL sets it
    before = network.generation_config.to_dict()
    assert sampled(tmp_path / "leaky", network, **peft) == clean
    assert network.generation_config.to_dict() == before  # what is saved is the model's own


def test_each_setting_alone(tmp_path):
    """Some of the settings above would switch others off."""
    made = trainer(config(tmp_path, objective="grpo"), model(scale=2.0), rollout_func=None)
    made.model.train()
    rows = [made.train_dataset[i] for i in range(2) for _ in range(4)]
    found = {}
    for name in (None, *LEAKS):
        base = made.accelerator.unwrap_model(made.model)
        base.generation_config = type(base.generation_config)(pad_token_id=0, eos_token_id=tokenizer().eos_token_id)
        leaky(base, [] if name is None else [name])
        torch.manual_seed(3)
        found[name] = made._generate_single_turn(made._tokenize_prompts([r["prompt"] for r in rows])[0], None, {}, 4)
    assert {name for name, ids in found.items() if ids != found[None]} == set()


def test_end_tokens_of_the_checkpoint_stay(tmp_path):
    many = [tokenizer().eos_token_id, *range(100, len(tokenizer()))]  # two thirds of the vocabulary end a turn
    network = leaky(model(scale=0.1))
    network.generation_config.eos_token_id = many
    ids = sampled(tmp_path, network)
    assert all(i not in many for row in ids for i in row[:-1])
    assert sum(row[-1] in many for row in ids) >= 15  # P(no end in 8 tokens) < 0.001 each


def test_our_own_generator_reads_none_of_it():
    clean, network = model(), leaky(model())

    def ours(network):
        made = TransformersGenerator(network.eval(), tokenizer(), Sampling(), eos_ids=end_ids(network, tokenizer()))
        return made.generate([Request(i, (5, 6, 7 + i), f"{i}", 8) for i in range(4)])

    assert ours(network) == ours(clean)


def test_a_failure_inside_gives_the_settings_back():
    network = leaky(model())
    found = network.generation_config
    with pytest.raises(ZeroDivisionError), own_settings_aside(network):
        assert network.generation_config.min_p is None
        raise ZeroDivisionError
    assert network.generation_config is found


REFUSED = {
    "transformers": {
        "temperature": 0.3, "top_k": 5, "top_p": 0.5, "min_p": 0.1, "repetition_penalty": 2.0, "num_beams": 2,
        "suppress_tokens": [5], "do_sample": False, "eos_token_id": 5, "max_new_tokens": 2, "stop_strings": ["a"],
        "typical_p": 0.2, "no_repeat_ngram_size": 2, "anything_new": 1,
    },
    "vLLM": {
        "logit_bias": {"5": 9.0}, "presence_penalty": 1.0, "min_tokens": 4, "bad_words": ["a"], "seed": 3,
        "stop": ["a"], "ignore_eos": True, "temperature": 0.3,
    },
}  # fmt: skip


@pytest.mark.parametrize(("engine", "name"), [(engine, name) for engine, keys in REFUSED.items() for name in keys])
def test_generation_kwargs_that_are_not_scored_are_refused(tmp_path, engine, name):
    value = REFUSED[engine][name]
    with pytest.raises(ValueError, match=f"generation_kwargs: '{name}' changes what {engine} samples"):
        config(tmp_path, generation_kwargs={name: value}, use_vllm=engine == "vLLM")
    args = config(tmp_path, use_vllm=engine == "vLLM")
    args.generation_kwargs = {name: value}  # assigned later: the trainer looks again
    with pytest.raises(ValueError, match=name):
        trainer(args)


def test_generation_kwargs_of_transformers_are_for_where_it_samples(tmp_path):
    how = json.dumps({"cache_implementation": "dynamic"})
    with pytest.raises(ValueError, match="cache_implementation: only transformers' own generate reads it"):
        trainer(config(tmp_path, objective="grpo", generation_kwargs=how))
    made = trainer(
        config(tmp_path, objective="grpo", generation_kwargs=how, use_transformers_continuous_batching=True)
    )
    assert made.generation_config.cache_implementation == "dynamic" and not made.samples_itself


def test_a_cut_distribution_is_said(tmp_path, caplog):
    logging.getLogger("srpo").propagate = True
    with caplog.at_level(logging.WARNING, logger="srpo.rollout.sampler_logprobs"):
        trainer(config(tmp_path, objective="grpo", top_p=0.9, min_p=0.1))
        assert any("top_p=0.9, min_p=0.1" in r.getMessage() for r in caplog.records)
        caplog.clear()
        trainer(config(tmp_path, objective="grpo", top_k=0))
        assert not [r for r in caplog.records if "scored" in r.getMessage()]
