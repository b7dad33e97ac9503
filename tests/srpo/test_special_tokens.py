"""Tokenizers without an end or a pad token, and ids that the model has no embeddings for."""

import copy

import pytest
import torch
from core_helpers import config, equal, logged, model, tokenizer, trainer, weights
from helpers import greedy_turn
from trl import SFTConfig

from srpo.rollout.generator import TransformersGenerator
from srpo.rollout.sampling_rules import Sampling
from srpo.rollout.special_tokens import end_ids, known_ends, settle_special_tokens
from srpo.rollout.turns import Request
from srpo.sft import encode_turn, sft

END = tokenizer().eos_token_id


def without(*names):
    found = copy.deepcopy(tokenizer())
    for name in names:
        setattr(found, name, None)
    return found


def nameless():
    """A model that names no end token either."""
    network = model()
    network.generation_config.eos_token_id = None
    return network


def with_outside(name, token="<|far|>"):
    found = copy.deepcopy(tokenizer())
    found.add_special_tokens({name: token})  # without model.resize_token_embeddings
    return found


def stepped(tmp_path, words, **changes):
    """Weights after a step on completions that the policy samples, what was sampled, and the trainer."""
    torch.manual_seed(5)
    args = config(tmp_path, objective="srpo", save_strategy="no", **changes)
    made = trainer(args, model(scale=0.5), rollout_func=None, processing_class=words)
    sampled = []
    inner = made._generate_single_turn

    def watched(*arguments, **options):
        found = inner(*arguments, **options)
        sampled.extend(found[0])
        return found

    made._generate_single_turn = watched
    made.train()
    return weights(made.model), sampled, made


def test_a_policy_whose_tokenizer_names_no_end_and_no_pad_trains_as_one_that_does(tmp_path):
    reference, expected, _ = stepped(tmp_path / "whole", copy.deepcopy(tokenizer()))
    words = without("eos_token", "pad_token")
    found, sampled, made = stepped(tmp_path / "lacks", words)
    assert sampled == expected
    assert equal(found, reference)  # what fills the rows is masked everywhere, also where it is the end token
    assert (words.eos_token_id, words.pad_token_id) == (END, END)
    assert made.eos_token_ids == [END]
    made.save_model()
    again = type(words).from_pretrained(tmp_path / "lacks")
    assert again.eos_token_id == END
    assert logged(made, "grad_norm")[0] > 0


def test_nothing_that_ends_a_text_is_one_sentence_at_start(tmp_path):
    words = without("eos_token")
    said = r"no end token, .* \(its vocabulary has '<\|im_end\|>'\)"
    with pytest.raises(ValueError, match=said):
        trainer(config(tmp_path), nameless(), processing_class=words)
    with pytest.raises(ValueError, match=said):
        greedy_turn(nameless(), words, "say red", 4)
    args = SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=[])
    with pytest.raises(ValueError, match=said):
        sft(nameless(), words, [{"input_ids": [5, 6], "labels": [-100, 6]}], args)
    assert known_ends(nameless(), words) == []  # a member of a pool writes to its limit


@pytest.mark.parametrize(("name", "kind"), [("eos_token", "end"), ("pad_token", "pad")])
def test_ids_without_embeddings_are_refused(tmp_path, name, kind):
    size = model().config.vocab_size
    with pytest.raises(ValueError, match=rf"{kind} token '<\|far\|>' has the id {size}.*resize_token_embeddings"):
        trainer(config(tmp_path), processing_class=with_outside(name))
    network, words = model(), with_outside(name)
    network.resize_token_embeddings(len(words))
    assert settle_special_tokens(network, words)[0] == words.eos_token_id


def test_a_template_that_writes_tokens_without_embeddings_is_refused(tmp_path):
    words = copy.deepcopy(tokenizer())
    words.add_tokens(["<|role|>", "<|unused|>"])
    trainer(config(tmp_path / "unused"), processing_class=copy.deepcopy(words))
    words.chat_template = words.chat_template.replace("<|im_start|>", "<|role|>")
    with pytest.raises(ValueError, match=r"token '<\|role\|>' of the chat template has the id"):
        trainer(config(tmp_path / "used"), processing_class=words)


def test_what_a_model_names_beyond_its_vocabulary_is_left_out():
    network = model()
    network.generation_config.eos_token_id = [END, -1, 99_999]
    assert end_ids(network, tokenizer()) == [END]
    network.generation_config.eos_token_id = [7, END]
    assert settle_special_tokens(network, tokenizer()) == [END, 7]


def test_our_generator_needs_no_pad_token_and_none_that_the_model_knows():
    requests = [Request(i, (5, 6, 7, 8)[: i + 1], f"{i}", 6) for i in range(3)]
    network = model(scale=0.5).eval()
    samples = [
        TransformersGenerator(network, words, Sampling(), eos_ids=[END]).generate(requests)
        for words in (tokenizer(), without("pad_token"), without("pad_token", "eos_token"), with_outside("pad_token"))
    ]
    assert all(found == samples[0] for found in samples)


@pytest.mark.parametrize("kind", ["no_end_token", "a_template_that_ends_with_another"])
def test_a_warm_start_teaches_to_end(tmp_path, kind):
    words = without("eos_token", "pad_token") if kind == "no_end_token" else copy.deepcopy(tokenizer())
    if kind != "no_end_token":
        words.chat_template = words.chat_template.replace("<|im_end|>", "|over|")
    row = {"prompt": [{"role": "user", "content": "say red"}], "completion": [{"role": "assistant", "content": "red"}]}
    args = SFTConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=[], max_steps=40, learning_rate=1e-2,
        per_device_train_batch_size=2, save_strategy="no", gradient_checkpointing=False, disable_tqdm=True,
    )  # fmt: skip
    policy = model(scale=1.0)
    turn = encode_turn(row, words, settle_special_tokens(policy, words))
    trained = sft(policy, words, [turn, turn], args)
    prompt = words.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=False)
    text, count = greedy_turn(trained, words, prompt, 16)
    assert text == "red"
    assert count == len(words.encode("red", add_special_tokens=False)) + 1
