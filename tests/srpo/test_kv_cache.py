"""The cache reaches the model and comes back under every name; what would lose it is an error."""

import random
from types import SimpleNamespace

import pytest
import torch
from core_helpers import model, tokenizer
from test_generate import EOS, conversation, generator
from transformers import (
    BartConfig,
    BartForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    GraniteMoeConfig,
    GraniteMoeForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    Qwen3ForCausalLM,
    set_seed,
)

from routers.quickstart.members.lm import LanguageModel
from srpo.rollout.generator import CACHE_NAMES, CachedForward, cache_argument, returned_cache

SMALL = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def sharp(network):
    """Peaked distributions: a token computed without its context would be another one."""
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6.0)
    return network.eval()


class OldName(Qwen3ForCausalLM):
    """A model as transformers before 5.24 has them."""

    def forward(self, input_ids, attention_mask=None, position_ids=None, past_key_values=None, use_cache=None, **rest):
        how = {cache_argument(Qwen3ForCausalLM): past_key_values} if past_key_values is not None else {}
        output = super().forward(input_ids, attention_mask, position_ids, use_cache=use_cache, **how, **rest)
        return SimpleNamespace(logits=output.logits, past_key_values=returned_cache(output))


class NewName(Qwen3ForCausalLM):
    """A model as transformers has them since 5.24."""

    def forward(self, input_ids, attention_mask=None, position_ids=None, cache=None, use_cache=None, **rest):
        how = {cache_argument(Qwen3ForCausalLM): cache} if cache is not None else {}
        output = super().forward(input_ids, attention_mask, position_ids, use_cache=use_cache, **how, **rest)
        return SimpleNamespace(logits=output.logits, cache=returned_cache(output))


@pytest.mark.parametrize("kind", [OldName, NewName])
def test_turns_equal_plain_ones_under_both_names(kind):
    network = model(layers=2).eval()
    network.__class__ = kind
    assert conversation(network, generator(network)) <= 1e-5


def _bloom():
    return BloomForCausalLM(BloomConfig(vocab_size=300, hidden_size=32, n_layer=2, n_head=2))


def _granite():
    """Takes `use_cache` among its open keywords only, and a config that says no wins where it is left out."""
    config = GraniteMoeConfig(**SMALL, intermediate_size=64, num_key_value_heads=1, num_local_experts=4)
    config.use_cache = False
    return GraniteMoeForCausalLM(config)


def _mamba():
    """`cache_params` before transformers 5.24, and a mask of the new tokens only."""
    return MambaForCausalLM(MambaConfig(vocab_size=300, hidden_size=32, num_hidden_layers=2, state_size=4))


def _mamba2():
    config = Mamba2Config(vocab_size=300, hidden_size=32, num_heads=4, head_dim=16, num_hidden_layers=2, n_groups=1)
    return Mamba2ForCausalLM(config)


@pytest.mark.parametrize("make", [_bloom, _granite, _mamba, _mamba2])
def test_families_with_their_own_arguments(make):
    set_seed(3)
    network = sharp(make())
    assert conversation(network, generator(network)) <= 1e-3


def test_a_model_that_reads_padding_as_text_is_refused():
    set_seed(0)
    config = BartConfig(vocab_size=300, d_model=32, decoder_layers=1, decoder_attention_heads=2)
    network = sharp(BartForCausalLM(config))
    with pytest.raises(ValueError, match="BartForCausalLM takes no position_ids and reads padding as text"):
        generator(network)


def test_a_model_without_a_cache_or_a_mask_is_refused():
    class NoCache(torch.nn.Module):
        def forward(self, input_ids, attention_mask=None, use_cache=None, **rest): ...

    class NoMask(torch.nn.Module):
        def forward(self, input_ids, cache=None, use_cache=None, **rest): ...

    class Closed(torch.nn.Module):
        def forward(self, input_ids, attention_mask=None, cache=None): ...

    for kind, said in ((NoCache, "no KV cache"), (NoMask, "no attention_mask"), (Closed, "does not take use_cache")):
        with pytest.raises(ValueError, match=said):
            CachedForward(kind(), kind())


def test_a_cache_that_does_not_come_back_is_an_error():
    network = model(layers=1).eval()
    plain = network.forward

    def forgets(*args, **kwargs):
        output = plain(*args, **{**kwargs, "use_cache": False})
        assert all(getattr(output, name, None) is None for name in CACHE_NAMES)
        return output

    run = CachedForward(network, network)
    network.forward = forgets
    with pytest.raises(RuntimeError, match="holds no KV cache"):
        run(torch.tensor([[5, 6, 7]]))


def test_the_cache_is_found_under_each_name():
    for name in CACHE_NAMES:
        assert returned_cache(SimpleNamespace(**{name: "c"})) == "c"


@torch.no_grad()
def test_the_recorded_members_completions_equal_plain_greedy_ones():
    """A prefix that is encoded once, suffixes of unequal length, rows that end early."""
    network = model(layers=2).eval()
    words = tokenizer()
    words.pad_token = words.pad_token or words.eos_token
    worker, draws = LanguageModel(network, words), random.Random(5)
    texts = list(words.get_vocab())
    prefix = "Which " * 3
    suffixes = ["".join(t for t in draws.sample(texts, n) if t.isascii()) + "?" for n in (1, 4, 9)]
    for found, suffix in zip(worker.complete(prefix, suffixes, 6, one_line=False), suffixes, strict=True):
        encode = lambda text: words(text, add_special_tokens=False)["input_ids"]  # noqa: E731
        prompt, new = [*encode(prefix), *encode(suffix)], []
        while len(new) < 6 and (not new or new[-1] != EOS):
            new.append(int(network(torch.tensor([[*prompt, *new]])).logits[0, -1].argmax()))
        assert found.text == words.decode(new, skip_special_tokens=True).strip()
        assert (found.prompt_tokens, found.completion_tokens) == (len(prompt), len(new))
