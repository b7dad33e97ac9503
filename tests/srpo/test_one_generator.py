"""One generator for everything: greedy as transformers' own `generate`, samples as the model's distribution says."""

import itertools
import math
import random

import pytest
import torch
from core_helpers import config, logged, model, tokenizer, trainer
from episode_worlds import ScriptedEnvironment
from scipy import stats
from test_generate import EOS, generator, plain, words
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from srpo.rollout.generator import ROOM
from srpo.rollout.sampling_rules import Sampling
from srpo.rollout.turns import Request
from srpo.trainer.generation_step import GenerationStep
from srpo.trainer.sampler import Sampler
from srpo.types import Observation

SMALL = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "eos_token_id": EOS, "pad_token_id": 0, "bos_token_id": None,
}  # fmt: skip
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
FAMILIES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SMALL)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(head_dim=8, **SMALL)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4, eos_token_id=EOS, bos_token_id=None)
    ),
    "gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(head_dim=8, sliding_window=16, layer_types=["sliding_attention", "full_attention"], **SMALL)
    ),
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(head_dim=8, **MOE, **SMALL)),
    "olmoe": lambda: OlmoeForCausalLM(OlmoeConfig(num_experts=4, num_experts_per_tok=2, **SMALL)),
}


def family(name):
    torch.manual_seed(0)
    network = FAMILIES[name]().eval()
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5.0)  # peaked: a token without its context would be another one
    return network


def prompts(common, *rest, seed=1):
    draws = random.Random(seed)
    system = words(draws, common)
    return [(*system, *words(draws, n)) for n in rest]


@torch.no_grad()
def theirs(network, texts, tokens, ends):
    """Greedy completions by transformers, one batch padded on the left, each cut after its end token."""
    width = max(map(len, texts))
    ids = torch.tensor([[0] * (width - len(t)) + list(t) for t in texts])
    mask = torch.tensor([[0] * (width - len(t)) + [1] * len(t) for t in texts])
    out = network.generate(
        input_ids=ids,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=tokens,
        eos_token_id=list(ends),
        pad_token_id=0,
    )
    rows = []
    for row in out[:, width:].tolist():
        end = next((i for i, token in enumerate(row) if token in ends), len(row) - 1)
        rows.append(tuple(row[: end + 1]))
    return rows


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_is_transformers_own(name):
    """Groups of two, prompts with and without a common beginning, ragged, rows that end early, one much longer."""
    network, ends, lengths = family(name), (EOS, *range(5, 60)), set()
    for texts in (prompts(40, 3, 9, 1, 30), prompts(0, 7, 21, 4), prompts(5, 12)):
        both = [text for text in texts for _ in range(2)]
        made = generator(network, eos=ends, keep_tokens=None)
        samples = made.generate([Request(i, text, f"{i}", 20) for i, text in enumerate(both)])
        found = [sample.ids for sample in samples]
        assert found == theirs(network, both, 20, ends)
        assert [sample.ended for sample in samples] == [ids[-1] in ends for ids in found]
        lengths |= {len(ids) for ids in found}
    assert len(lengths) > 1


def test_each_distinct_prompt_is_fed_once_and_what_they_share_once_for_all():
    network, fed = family("qwen3"), []
    made = generator(network, recorder=lambda rows, positions: fed.append((rows, positions)), keep_tokens=None)
    texts = prompts(40, 3, 9, 5)
    requests = [Request(i, texts[i // 4], f"{i}", 1) for i in range(12)]
    samples = made.generate(requests)
    assert [rows for rows, _ in fed] == [[tuple(range(12))], [(0, 1, 2, 3), (4, 5, 6, 7), (8, 9, 10, 11)]]
    assert sum(int((positions >= 0).sum()) for _, positions in fed) == 40 + 3 + 9 + 5
    assert [sample.ids for sample in samples] == [plain(network, request)[0] for request in requests]


def test_the_beginning_of_the_prompts_before_is_not_fed_again():
    """Served one at a time: the second shows what the first had in common with it, from the third on it pays."""
    network, widths = family("qwen3"), []
    made = generator(network, keep_tokens=100)
    forward = made._run.__call__
    made._run = lambda ids, *rest: widths.append(ids.size(1)) or forward(ids, *rest)
    texts = [*prompts(40, 3, 9, 5, 7), *prompts(50, 4, 6, seed=2), prompts(36, 8)[0]]
    for i, text in enumerate(texts):
        request = Request(i, text, "x", 1)
        assert made.generate([request])[0].ids == plain(network, request)[0]
    #         first  second  3rd 4th  other system: as before      the first system again, but for its last words
    assert widths == [43, 40, 9, 5, 7, 54, 50, 6, 44], widths


def test_prompts_of_very_different_lengths_are_fed_apart():
    network, shapes = family("llama"), []
    made = generator(network, recorder=lambda rows, positions: shapes.append(tuple(positions.shape)))
    texts = prompts(0, 600, 20, 590, 24, 17)
    requests = [Request(i, text, f"{i}", 3) for i, text in enumerate(texts)]
    samples = made.generate(requests)
    assert shapes[:2] == [(2, 600), (3, 24)]
    assert [sample.ids for sample in samples] == [plain(network, request)[0] for request in requests]


def test_a_turn_longer_than_the_room_of_its_cache():
    network = family("llama")
    request = Request(0, (5, 6, 7), "x", 2 * ROOM + 9)
    made = generator(network, eos=())
    ids = made.generate([request])[0].ids
    assert ids == plain(network, request, eos=())[0]
    later = Request(0, (*request.ids, *ids, 9, 10), "y", 3)
    assert made.generate([later])[0].ids == plain(network, later, eos=())[0]


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.7), Sampling(top_p=0.8, min_p=0.02)])
def test_samples_follow_the_distribution_of_two_tokens(sampling):
    """4,000 completions of a vocabulary of 8, against the exact probabilities of all pairs (chi-square, p > 0.001)."""
    torch.manual_seed(0)
    network = LlamaForCausalLM(LlamaConfig(**{**SMALL, "vocab_size": 8, "eos_token_id": 7})).eval()
    network.lm_head.weight.data.mul_(30.0)
    prompt, count = (1, 2, 3), 4000
    made = generator(network, sampling, eos=(7,), keep_tokens=None)
    samples = made.generate([Request(i, prompt, f"seed:{i}", 2) for i in range(count)])

    def exact(context):
        logits = network(torch.tensor([context])).logits[0, -1:].detach().double() / sampling.temperature
        kept = logits
        if sampling.min_p:  # as transformers does it: the nucleus, then what is likely enough
            ordered, order = logits.softmax(-1).sort(descending=True)
            before = ordered.cumsum(-1) - ordered
            kept = logits.masked_fill((before > sampling.top_p).gather(1, order.argsort(-1)), -math.inf)
            p = kept.softmax(-1)
            kept = kept.masked_fill(p < sampling.min_p * p.max(), -math.inf)
        return logits.log_softmax(-1)[0].tolist(), kept.softmax(-1)[0].tolist()

    _, first = exact(prompt)
    expected, whole = {}, {}
    for a in range(8):
        scored, second = exact((*prompt, a))
        whole[a] = scored
        ids = [((a,), first[a])] if a == 7 else [((a, b), first[a] * second[b]) for b in range(8)]
        expected |= {pair: p * count for pair, p in ids if p > 0}
    seen = {pair: sum(s.ids == pair for s in samples) for pair in expected}
    assert sum(seen.values()) == count, "something without probability was drawn"
    common = [pair for pair in expected if expected[pair] >= 5]
    rare = [pair for pair in expected if expected[pair] < 5]
    counts = [seen[pair] for pair in common] + [sum(seen[pair] for pair in rare)] * bool(rare)
    wanted = [expected[pair] for pair in common] + [sum(expected[pair] for pair in rare)] * bool(rare)
    assert stats.chisquare(counts, wanted, sum_check=False).pvalue > 1e-3
    for sample in samples[:50]:
        if len(sample.ids) > 1:
            assert sample.logprobs[1] == pytest.approx(whole[sample.ids[0]][sample.ids[1]], abs=1e-5)


@pytest.mark.parametrize("environment", [None, ScriptedEnvironment(lambda row, t, text: Observation(end="done"))])
def test_log_probs_of_the_sampler_are_the_scored_ones(tmp_path, environment):
    """With cuts too: they bend what is sampled, not what is scored, by one turn or in an environment's."""
    how = {"objective": "grpo", "loss_type": "minirl", "num_iterations": 2, "max_steps": 2}
    args = config(tmp_path, **how, temperature=0.7, top_k=3, top_p=0.8)
    made = trainer(args, model(layers=2), rollout_func=None, environment=environment)
    made.train()
    assert max(logged(made, "sampling/logp_difference")) < 1e-5


def test_every_completion_has_a_seed_of_its_own(tmp_path):
    """By run, step, part of it, row and prompt; equal prompts are drawn apart, evaluation apart from training."""
    args = config(tmp_path)

    class Asked:
        def generate(self, requests):
            self.seeds = [request.seed for request in requests]
            return []

        def finish(self):
            pass

    class Rank:
        process_index = 0

    def seeds(step, texts, rank=0):
        Rank.process_index, asked = rank, Asked()
        Sampler(args, Rank, tokenizer()).completions(asked, step, texts)
        return asked.seeds

    texts = [[5, 6], [5, 6], [7, 8]]
    steps = [GenerationStep((), *which) for which in itertools.product((True, False), (0, 3), (0, 1))]
    found = [seed for step in steps for rank in (0, 1) for seed in seeds(step, texts, rank)]
    assert len(set(found)) == len(found) == 48
    assert seeds(steps[0], [[9, 9], [5, 6]])[1] == seeds(steps[0], texts)[1], "whatever else is in the batch"
    with pytest.raises(ValueError, match="a prompt has no token"):
        seeds(steps[0], [[5], []])
