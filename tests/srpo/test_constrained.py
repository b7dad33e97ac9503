"""A tag holds one of a few alternatives: for any tokenizer's boundaries, in samples, and in probabilities."""

import math
import random

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from srpo.rollout.constrained import OneOf, choice_probabilities
from srpo.rollout.generator import TransformersGenerator
from srpo.rollout.sampling_rules import Sampling
from srpo.rollout.turns import Request
from srpo.scratch_lm import tiny_causal_lm, train_tokenizer
from srpo.texts import text_of

NAMES = ["gpt", "gpt-4", "gpt-4o", "gpt-4o-mini", "small", "s"]
TEXTS = [f"<think>why</think><route>{name}</route> gpt-4o gpt-4 mini small" for name in NAMES] * 3
TAGS = ["<think>", "</think>", "<route>", "</route>"]


def merged():
    """A vocabulary whose tokens run over every boundary of the tag."""
    alphabet = sorted({*"".join(TEXTS), "\n", '"'} | set(pre_tokenizers.ByteLevel.alphabet()))
    odd = [
        "<r",
        "<ro",
        "out",
        "ute",
        "e>",
        "te>g",
        ">g",
        ">\u010a",
        "></",
        ">gpt-34",
        "gp",
        "t-4",
        "</",
        "4</",
        "ro",
        "route",
    ]
    vocab = {token: i for i, token in enumerate(dict.fromkeys([*alphabet, *odd]))}
    plain = Tokenizer(
        models.WordPiece({**vocab, "[UNK]": len(vocab)}, unk_token="[UNK]", continuing_subword_prefix="")
    )
    plain.decoder = decoders.ByteLevel()
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    plain.add_special_tokens([AddedToken("<|end|>")])
    return PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<|end|>", pad_token="<|end|>")


TOKENIZERS = {
    "tags are tokens": lambda: train_tokenizer(TEXTS, vocab_size=320, whole=TAGS),
    "tags are text": lambda: train_tokenizer(TEXTS, vocab_size=330),
    "bytes": lambda: train_tokenizer(["x"], vocab_size=260),
    "names are tokens": lambda: train_tokenizer(TEXTS, vocab_size=320, whole=[*TAGS, *NAMES]),
    "tokens over boundaries": merged,
}


@pytest.fixture(scope="module", params=TOKENIZERS, ids=str)
def tokenizer(request):
    return TOKENIZERS[request.param]()


@pytest.fixture(scope="module")
def names(tokenizer):
    return OneOf(tokenizer, "<route>", NAMES, ["</route>"])


def routed(text):
    """What stands in the first route tag, or None."""
    _, opened, rest = text.partition("<route>")
    return rest.partition("</route>")[0] if opened else None


def test_every_alternative_can_be_written_and_the_text_is_free_again(tokenizer, names):
    for name in NAMES:
        ids = tokenizer(f"why <route>{name}</route> and more", add_special_tokens=False)["input_ids"]
        allowed = names(ids)
        text = [text_of(tokenizer, ids[:n]) for n in range(len(ids) + 1)]
        for n, (i, choices) in enumerate(zip(ids, allowed, strict=True)):
            assert choices is None or i in choices, (name, n, text[n])
            if "</route>" in text[n]:
                assert choices is None
        inside = [n for n in range(len(ids)) if "<route>" in text[n] and "</route>" not in text[n]]
        assert inside and all(allowed[n] is not None for n in inside)


def test_a_walk_through_the_mask_writes_a_name_and_nothing_else(tokenizer, names):
    """Random ids, wherever the mask lets them; the opening is written in all ways that the vocabulary has."""
    dice, vocabulary = random.Random(0), sorted(set(tokenizer.get_vocab().values()))
    end, pieces = tokenizer.eos_token_id, {i: text_of(tokenizer, [i]) for i in vocabulary}
    found = set()
    for _ in range(300):
        ids, text = [], ""
        while "</route>" not in text:
            allowed, rest = names.after(ids), "<route>"[len(text) :]
            pool = vocabulary if allowed is None else allowed
            if "<route>" not in text:  # towards the tag
                pool = [i for i in pool if pieces[i] and (rest.startswith(pieces[i]) or pieces[i].startswith(rest))]
            ids.append(dice.choice([i for i in pool if i != end]))
            text = text_of(tokenizer, ids)
        assert routed(text) in NAMES and text.endswith("</route>"), text
        assert names([*ids, end]) == [names.after(ids[:n]) for n in range(len(ids) + 1)]
        found.add(routed(text))
    assert found == set(NAMES)


def policy(tokenizer, seed=0):
    network = tiny_causal_lm(tokenizer, hidden=32, layers=1, heads=2, intermediate=32, seed=seed).eval()
    with torch.no_grad():
        for p in network.parameters():
            p.mul_(3)  # far from uniform
    return network


def generator(tokenizer, network, temperature=1.0, stop=()):
    return TransformersGenerator(
        network, tokenizer, Sampling(temperature, stop=stop), eos_ids=[tokenizer.eos_token_id]
    )


@pytest.mark.parametrize("seed", range(4))
def test_a_random_policy_invents_no_member(tokenizer, names, seed):
    """1,000 samples of an untrained policy, in batches, from an open tag."""
    made = generator(tokenizer, policy(tokenizer, seed), stop=("</route>",))
    opening = tokenizer("<route>", add_special_tokens=False)["input_ids"]
    requests = [Request(n, tuple(opening), f"{n}", 40, allowed=names.state(opening)) for n in range(250)]
    samples = made.generate(requests)
    texts = [text_of(tokenizer, [*opening, *sample.ids]) for sample in samples]
    assert {routed(text) for text in texts} <= set(NAMES) and all(text.endswith("</route>") for text in texts)


@torch.no_grad()
def test_probabilities_sum_to_one_and_are_what_is_sampled(tokenizer, names):
    network = policy(tokenizer)
    opening = tokenizer("why <route>", add_special_tokens=False)["input_ids"]
    length, tree = names.inside(opening)
    assert length == len(opening)
    [found] = choice_probabilities(generator(tokenizer, network).generate, [(tree, opening, 0)])
    assert set(found) == set(NAMES) and math.isclose(sum(found.values()), 1.0, abs_tol=1e-9)
    for name in NAMES:  # by hand: one full forward, renormalised at each step over what was allowed there
        path = names.spelling(tree, name)
        logits = network(torch.tensor([[*opening, *path]])).logits[0].double()
        p = 1.0
        for n, i in enumerate(path, start=len(opening)):
            allowed = list(names.after([*opening, *path[: n - len(opening)]]))
            p *= float(logits[n - 1, allowed].softmax(-1)[allowed.index(i)])
        assert math.isclose(found[name], p, rel_tol=1e-4, abs_tol=1e-9)
    made = generator(tokenizer, network, stop=("</route>",))
    many = made.generate([Request(n, tuple(opening), f"{n}", 40, allowed=names.state(opening)) for n in range(1000)])
    texts = [routed(text_of(tokenizer, [*opening, *sample.ids])) for sample in many]
    for name in NAMES:
        p = found[name]
        assert abs(texts.count(name) / 1000 - p) <= 4 * math.sqrt(p * (1 - p) / 1000) + 1e-3


@torch.no_grad()
def test_sampled_log_probs_are_those_of_the_mask(tokenizer, names):
    """What the sampler says of its tokens is what a scorer gets with the mask of each position."""
    network = policy(tokenizer)
    opening = tokenizer("<route>", add_special_tokens=False)["input_ids"]
    made = generator(tokenizer, network, stop=("</route>",))
    sample = made.generate([Request(0, tuple(opening), "x", 40, allowed=names.state(opening))])[0]
    ids = [*opening, *sample.ids]
    logits = network(torch.tensor([ids])).logits[0]
    for n, logp in enumerate(sample.logprobs, start=len(opening)):
        allowed = list(names(ids)[n])
        assert math.isclose(float(logits[n - 1, allowed].log_softmax(-1)[allowed.index(ids[n])]), logp, abs_tol=1e-4)


def test_one_choice_needs_no_forward():
    tokenizer = TOKENIZERS["tags are tokens"]()
    only = OneOf(tokenizer, "<route>", ["small"], ["</route>"])
    ids = tokenizer("<route>", add_special_tokens=False)["input_ids"]
    assert choice_probabilities(lambda requests: [], [(only.inside(ids)[1], ids, 0)]) == [{"small": 1.0}]


def test_several_closings_of_one_alternative():
    tokenizer = TOKENIZERS["bytes"]()
    names = OneOf(tokenizer, "<search>", ["a", "ab"], [":", "</search>"])
    ids = tokenizer("<search>a", add_special_tokens=False)["input_ids"]
    assert {text_of(tokenizer, [i]) for i in names.after(ids)} == {"b", ":", "<"}
    ask = generator(tokenizer, policy(tokenizer)).generate
    [found] = choice_probabilities(ask, [(names.inside(ids)[1], ids[:-1], 0)])
    assert set(found) == {"a", "ab"} and math.isclose(sum(found.values()), 1.0)


@pytest.mark.parametrize(
    ("alternatives", "closings", "words"),
    [
        ([], ["x"], "give different texts"),
        (["a", "a"], [">"], "give different texts"),
        (["a", "ab"], [""], "'a' begins 'ab'"),
        ([""], [""], "give different texts"),
    ],
)
def test_what_cannot_be_told_apart_is_refused(alternatives, closings, words):
    with pytest.raises(ValueError, match=words):
        OneOf(TOKENIZERS["bytes"](), "<route>", alternatives, closings)


def test_an_unmasked_completion_is_scored_as_far_as_the_mask_reaches():
    tokenizer = TOKENIZERS["bytes"]()
    names = OneOf(tokenizer, "<route>", ["small"], ["</route>"])
    ids = tokenizer("<route>gpt</route>", add_special_tokens=False)["input_ids"]
    assert [None if a is None else len(a) for a in names(ids)] == [*[None] * 7, 1, *[None] * (len(ids) - 8)]
