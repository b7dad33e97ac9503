"""Turns of real tiny models: cached decoding equals re-prefilling, samples belong to their seeds, turns end."""

import asyncio
import math
import random

import pytest
import torch
from core_helpers import digest, model, tokenizer
from episode_worlds import ScriptedEnvironment
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    JambaConfig,
    JambaForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from srpo.rollout.generator import Stops, TransformersGenerator, draw
from srpo.rollout.kv_cache import reuses_cache
from srpo.rollout.loop import Limits, play
from srpo.rollout.sampling_rules import Sampling
from srpo.rollout.turns import ALL_TOKENS, Request
from srpo.types import Observation

EOS = tokenizer().eos_token_id
GREEDY = Sampling(temperature=0)


@pytest.fixture(scope="module")
def policy():
    return model(layers=2).eval()


def generator(network, sampling=GREEDY, eos=(EOS,), **options):
    return TransformersGenerator(network, tokenizer(), sampling, eos_ids=eos, **options)


def words(draws, n):
    return tuple(draws.randrange(5, 280) for _ in range(n))


@torch.no_grad()
def plain(network, request, sampling=GREEDY, eos=(EOS,)):
    """The same turn without any cache or batch: one full forward per token."""
    draws, ids, logps = random.Random(request.seed), [], []
    while len(ids) < request.max_tokens:
        logits = network(torch.tensor([[*request.ids, *ids]])).logits[0, -1:]
        (token,), (logp,) = draw(logits, sampling, [draws.random()], [request.choices], [(*request.ids, *ids)])
        ids.append(token)
        logps.append(logp)
        if token in eos or request.choices:
            break
    return tuple(ids), logps


def conversation(network, make, turns=4, rows=5, sampling=GREEDY, eos=(EOS,)):
    """Several turns with ragged prompts and observations; every turn is compared with the plain one."""
    draws = random.Random(7)
    contexts = [words(draws, n) for n in (3, 9, 3, 17, 6)[:rows]]
    contexts[2] = contexts[0]  # two rows of one group
    worst = 0.0
    for turn in range(turns):
        requests = [Request(i, c, f"{i}:{turn}", draws.randrange(2, 9)) for i, c in enumerate(contexts)]
        if turn == 2:
            del requests[3]  # an episode that is over
        for request, sample in zip(requests, make.generate(requests), strict=True):
            ids, logps = plain(network, request, sampling, eos)
            assert sample.ids == ids
            worst = max(worst, max(abs(a - b) for a, b in zip(sample.logprobs, logps, strict=True)))
            contexts[request.row] = (*request.ids, *ids, *words(draws, draws.randrange(0, 12)))
    return worst


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_a_cache_kept_over_turns_equals_prefilling_again(policy, temperature):
    """Greedy and sampled, four turns, ragged observations, rows that end at different tokens and leave."""
    some = (EOS, *range(5, 40))  # many ending tokens: turns of different lengths
    sampling = Sampling(temperature=temperature)
    made = generator(policy, sampling, some)
    assert reuses_cache(policy)
    assert conversation(policy, made, sampling=sampling, eos=some) <= 1e-5


def test_a_turn_is_told_when_it_is_written(policy):
    """Once, as it is returned, and after as many forwards as it has tokens."""
    made, told = generator(policy, eos=()), []
    lengths = (3, 1, 5)

    def tell(turns):
        told.extend((request.row, sample, made.forwards) for request, sample in turns)

    requests = [Request(row, (5, 6, 7), f"{row}", n, told=tell) for row, n in enumerate(lengths)]
    samples = made.generate(requests)
    assert [row for row, _, _ in told] == [1, 0, 2] and [sample for _, sample, _ in told] == [
        samples[i] for i in (1, 0, 2)
    ]
    assert [forwards for _, _, forwards in told] == [1, 3, 5]


def test_later_turns_feed_only_what_is_new(policy):
    fed = []
    made = generator(policy, eos=(), recorder=lambda rows, positions: fed.append((rows, positions)))
    first = made.generate([Request(0, (5, 6, 7), "a", 2), Request(1, (5, 6, 7), "b", 2)])
    assert fed[0][0] == [(0, 1)], "a group's prompt is forwarded once, for all its rows"
    assert fed[0][1].tolist() == [[0, 1, 2]] and fed[1][1].tolist() == [[3], [3]]
    assert first[0].ids == first[1].ids
    fed.clear()
    context = (5, 6, 7, *first[0].ids, 9)
    made.generate([Request(0, context, "a", 1), Request(1, (*context, 11), "b", 1)])
    # In the cache are the prompt and all but the last token: 4 ids.
    assert fed[0][0] == [(0,), (1,)] and fed[0][1].tolist() == [[-1, 4, 5], [4, 5, 6]]


@pytest.mark.parametrize(("keep", "fed"), [(0, [8, 8, 8]), (100, [3, 3, 3]), (5, [8, 3, 8])])
def test_conversations_that_take_turns_keep_their_caches_within_bounds(policy, keep, fed):
    """Served, not rolled out: a row that a batch leaves out comes back, five tokens of context and three new ones.

    Five tokens beside the batch's own: row 0 is forgotten when row 2 is asked, row 1 when row 0 is asked again.
    """
    seen, draws = [], random.Random(3)
    made = generator(policy, recorder=lambda rows, positions: seen.append(positions), keep_tokens=keep)
    contexts = [words(draws, 5) for _ in range(3)]
    for row in range(3):
        made.generate([Request(row, contexts[row], f"{row}", 1, choices=(7, 8))])
    for row, count in zip((0, 2, 1), fed, strict=True):
        seen.clear()
        request = Request(row, (*contexts[row], *words(draws, 3)), f"{row}:1", 1, choices=(7, 8))
        [sample] = made.generate([request])
        assert sample.ids == plain(policy, request)[0]
        assert sum(int((positions >= 0).sum()) for positions in seen) == count
        assert sum(len(kept.ids) for other, kept in made.contexts._kept.items() if other != row) <= keep
    for kept in made.contexts._kept.values():
        for states in (states for layer in kept.layers for states in layer):
            assert states.untyped_storage().nbytes() == states.nbytes, "no memory of the batch is kept with it"


def test_a_row_that_is_left_out_comes_back_until_it_is_over(policy):
    seen = []
    made = generator(policy, eos=(), recorder=lambda rows, positions: seen.append(positions), keep_tokens=ALL_TOKENS)
    made.generate([Request(row, (5, 6, 7 + row), f"{row}", 1, choices=(7, 8)) for row in range(3)])
    made.generate([Request(1, (5, 6, 8, 7, 9), "1:1", 1, choices=(7, 8))])
    made.over([2])
    seen.clear()
    for row, fed in ((0, 2), (2, 5)):
        request = Request(row, (5, 6, 7 + row, 8, 9), f"{row}:1", 1, choices=(7, 8))
        assert made.generate([request])[0].ids == plain(policy, request)[0]
        assert int((seen.pop() >= 0).sum()) == fed


@torch.no_grad()
def test_samples_do_not_depend_on_when_answers_come(policy):
    """Each row alone, in an order drawn anew for every turn, against rows that take all their turns together."""

    class OneByOne(TransformersGenerator):
        """One more answer may come whenever the last one was taken."""

        permits, sizes = 1, ()

        def generate(self, requests):
            self.sizes = (*self.sizes, len(requests))
            return super().generate(requests)

        def over(self, rows):
            super().over(rows)
            self.permits += 1

    class Gate(ScriptedEnvironment):
        waiting = ()

        def episode(self, row, seed):
            episode = super().episode(row, seed)
            step = episode.step

            async def gated(text):
                me = (digest((order, seed, len(episode.texts))), row["i"])
                self.waiting = (*self.waiting, me)
                while order is not None and (made.permits <= 0 or me != min(self.waiting)):
                    await asyncio.sleep(0.001)
                self.waiting = tuple(other for other in self.waiting if other != me)
                made.permits -= 1
                return await step(text)

            episode.step = gated
            return episode

    limits = Limits(turns=3, tokens=100, observation_tokens=8, step_seconds=60.0, turn_tokens=6)
    prompts, seeds, found = [(5, 6, 7 + i % 2) for i in range(4)], [f"s{i}" for i in range(4)], []
    for order in (None, 1, 2):
        made = OneByOne(policy, tokenizer(), Sampling(), eos_ids=(EOS,), keep_tokens=ALL_TOKENS)
        world = Gate(lambda row, t, text: Observation(f"{row['i']} {t}"))
        rows = [{"i": i} for i in range(4)]
        found.append(play(world, rows, prompts, seeds, made, tokenizer(), limits, rounds=order is None))
        assert made.sizes == ((4, 4, 4) if order is None else (4, *[1] * 8))
        assert made.contexts._kept == {}
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert [(t.owner, t.ids) for t in a.turns] == [(t.owner, t.ids) for t in b.turns] and a.stop == b.stop
            ours, theirs = ([x for t in some.turns for x in t.logprobs or ()] for some in (a, b))
            assert ours == pytest.approx(theirs, abs=1e-5)


def test_a_rewritten_context_is_prefilled_from_the_start(policy):
    made = generator(policy, eos=())
    made.generate([Request(0, (5, 6, 7, 8), "a", 3)])
    request = Request(0, (5, 9, 7, 8), "a", 3)
    assert made.generate([request])[0].ids == plain(policy, request, eos=())[0]


def _gemma():
    config = Gemma3TextConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
    )
    return Gemma3ForCausalLM(config)


def _jamba():
    config = JambaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=4,
        expert_layer_offset=3,
        num_experts=2,
        mamba_d_state=4,
        mamba_dt_rank=4,
        use_mamba_kernels=False,
    )
    return JambaForCausalLM(config)


def _qwen3_next():
    config = Qwen3NextConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        layer_types=["linear_attention", "full_attention"],
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    )
    return Qwen3NextForCausalLM(config)


@pytest.mark.parametrize("build", [_gemma, _jamba, _qwen3_next])
def test_models_whose_cache_cannot_be_cut_are_prefilled_again(build):
    """Sliding windows that drop columns, Mamba and linear attention: decided by what the cache is made of."""
    torch.manual_seed(0)
    network = build().eval()
    for parameter in network.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(4.0)
    assert not reuses_cache(network)
    some = (EOS, *range(5, 60))
    assert conversation(network, generator(network, eos=some), eos=some) <= 1e-4


def test_a_sample_depends_on_its_seed_and_context_only(policy):
    """Not on who else is in the batch, the order of rows, or what was generated before."""
    draws = random.Random(3)
    contexts = [words(draws, n) for n in (4, 4, 12, 7, 4, 9)]
    contexts[4] = contexts[1]
    requests = [Request(i, c, f"run:3:q{i}:0:0", 12) for i, c in enumerate(contexts)]
    sampling = Sampling(temperature=0.9, top_p=0.95, top_k=50, min_p=0.01)
    whole = generator(policy, sampling).generate(requests)
    assert len({s.ids for s in whole}) == len(whole), "rows 1 and 4 share a prompt, not a seed"
    alone = [generator(policy, sampling).generate([r])[0] for r in requests]
    used = generator(policy, sampling)
    used.generate([Request(9, (8, 9, 10), "other", 5)])
    backwards = used.generate(requests[::-1])[::-1]
    assert [s.ids for s in whole] == [s.ids for s in alone] == [s.ids for s in backwards]


def test_a_draw_is_of_the_cut_distribution_and_its_log_prob_of_the_whole_one():
    """By hand, and against a count of 4,000 draws."""
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, -5.0]])
    sampling = Sampling(temperature=0.5, top_k=3)
    # z/T = 4, 2, 0: e^4 = 54.598, e^2 = 7.389, 1 -> sum 62.987; all five: 0.135 and 0.000045 more, 63.123
    expected = [4 - math.log(62.987), 2 - math.log(62.987), -math.log(62.987)]
    counts = [0, 0, 0]
    seed = random.Random(0)
    for _ in range(4000):
        (token,), (logp,) = draw(logits, sampling, [seed.random()], [None])
        counts[token] += 1
        assert logp == pytest.approx((4, 2, 0)[token] - math.log(63.123), abs=1e-4)
    for count, logp in zip(counts, expected, strict=True):
        p = math.exp(logp)
        assert abs(count / 4000 - p) <= 4 * math.sqrt(p * (1 - p) / 4000)


def test_choices_are_renormalised_and_ignore_the_cuts():
    logits = torch.tensor([[9.0, 2.0, 1.0, 0.0]])
    # Allowed 1 and 3 at T = 2: e^1 and e^0, so p(1) = e / (1 + e) = 0.7311
    sampling = Sampling(temperature=2.0, top_k=1, top_p=0.1)
    picked = [draw(logits, sampling, [u], [(3, 1)]) for u in (0.0, 0.73, 0.74, 0.999999)]
    assert [ids for ids, _ in picked] == [[1], [1], [3], [3]]
    assert picked[0][1] == pytest.approx([math.log(0.731059)], abs=1e-5)
    assert picked[3][1] == pytest.approx([math.log(0.268941)], abs=1e-5)
    assert draw(logits, GREEDY, [0.9], [(3, 2)])[0] == [2]


def test_the_repetition_penalty_is_transformers():
    logits = torch.tensor([[2.0, 1.5, -1.0], [2.0, 1.5, -1.0]])
    sampling = Sampling(temperature=0, repetition_penalty=2.0)
    # Row 0 has seen 0 (2 -> 1): 1 is best. Row 1 has seen 0 and 1 (1, 0.75): 0 is best.
    ids, _ = draw(logits, sampling, [0.0, 0.0], [None, None], [(0,), (1, 0, 0)])
    assert ids == [1, 0]


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-53])
def test_a_token_without_probability_is_never_drawn(uniform):
    logits = torch.full((1, 50), -torch.inf)
    logits[0, 17] = 0.0
    assert draw(logits, Sampling(), [uniform], [None])[0] == [17]


def test_stop_strings_end_a_turn_with_the_token_that_completes_them():
    stops = Stops(tokenizer(), ("</answer>", "é>"))
    ids = tokenizer()("so <answer> x </answer>!", add_special_tokens=False)["input_ids"]
    found = [n for n in range(1, len(ids) + 1) if stops.ended(ids[:n])]
    text = tokenizer().decode(ids[: found[0]])
    assert "</answer>" in text and "</answer>" not in tokenizer().decode(ids[: found[0] - 1])
    accented = tokenizer()("café>", add_special_tokens=False)["input_ids"]  # é is two bytes, two tokens
    assert stops.ended(accented) and not stops.ended(accented[:-1])


def test_a_turn_stops_at_a_stop_string(policy):
    request = Request(0, (5, 6, 7), "s", 30)
    ids = plain(policy, request, eos=())[0]
    text = [tokenizer().decode([i], skip_special_tokens=True) for i in ids]
    n = next(i for i, t in enumerate(text) if i > 2 and t.isascii() and t.strip() and t not in "".join(text[:i]))
    sample = generator(policy, Sampling(temperature=0, stop=(text[n],)), eos=()).generate([request])[0]
    assert sample.ended and sample.ids == ids[: n + 1]


def test_ended_says_why_a_turn_is_over(policy):
    request = Request(0, (5, 6, 7), "s", 4)
    free = generator(policy, eos=()).generate([request])[0]
    assert not free.ended and len(free.ids) == 4
    at_once = generator(policy, eos=(free.ids[0],)).generate([request])[0]
    assert at_once.ended and at_once.ids == free.ids[:1], "the end token belongs to the turn"
    choice = generator(policy).generate([Request(0, (5, 6, 7), "s", 4, choices=(8, 9))])[0]
    assert choice.ended and len(choice.ids) == 1 and choice.ids[0] in (8, 9)


def test_processes_with_sharded_parameters_stay_in_step(policy):
    """What `finish` does while another process is still busy: empty forwards, one per forward of the other."""
    others = iter([True, True, True, False])  # the other process: busy for two more forwards after ours
    made = generator(policy, eos=(), any_busy=lambda busy: busy or next(others))
    made.generate([Request(0, (5, 6), "a", 3)])
    assert made.forwards == 3
    made.finish()
    assert made.forwards == 6
