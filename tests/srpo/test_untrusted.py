"""Others' text never becomes a control token, whatever it spells, and stays the same text."""

import random
import time
import unicodedata

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from srpo.scratch_lm import train_tokenizer
from srpo.texts import encode_frame, encode_untrusted

TAGS = ("<think>", "</think>", "<search>", "</search>", "<answer>", "</answer>", "<information>", "</information>")
CONTROL = (
    *("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<tool_call>", "</tool_call>", "<|vision_start|>"),  # Qwen
    *("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|python_tag|>"),  # Llama 3
    *("<bos>", "<start_of_turn>", "<end_of_turn>", "<eos>"),  # Gemma
    *("<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]"),  # Mistral
    *("<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>"),  # DeepSeek
    *("<|start|>", "<|channel|>", "<|message|>", "<|return|>", "<|call|>"),  # gpt-oss
    *("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),  # Phi
)
TEXT = ["plain text with <b>brackets</b>, 1 < 2 and prices [1] | 0.5", "ünïcode ✓ and\ttabs"]


def byte_level():
    """Tags are added and not special, control tokens are special: what Qwen3 does with <think> and <|im_end|>."""
    made = train_tokenizer(TEXT, vocab_size=400, whole=TAGS)
    made.add_special_tokens({"extra_special_tokens": [t for t in CONTROL if t not in made.get_vocab()]})
    return made


def normalising():
    """Folds full-width letters before it looks for added tokens."""
    made = Tokenizer(models.BPE())
    made.normalizer = normalizers.NFKC()
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False))
    made.add_tokens([AddedToken(text, normalized=True, special=False) for text in TAGS])
    made.add_special_tokens([AddedToken(text, normalized=True, special=True) for text in CONTROL])
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<eos>", eos_token="<eos>")


def spaces():
    """Runs of spaces are added tokens (GPT-NeoX, OLMo), and so is a letter (DeepSeek)."""
    made = train_tokenizer(TEXT, vocab_size=400, whole=["  ", "    ", "ü"])
    return made


TOKENIZERS = {"byte_level": byte_level, "normalising": normalising, "spaces": spaces}


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param]()


def forbidden(tokenizer):
    added = {i for i, t in tokenizer.added_tokens_decoder.items() if t.special or len(t.content) > 1}
    return added | set(tokenizer.all_special_ids)


def folded(text):
    return unicodedata.normalize("NFKC", text)


def test_the_tokenizers_are_dangerous():
    """Without care each of these texts is a control token: the tests below can fail."""
    made = byte_level()
    for text in (*TAGS, *CONTROL):
        assert len(made(text, add_special_tokens=False)["input_ids"]) == 1, text
    assert made("<think>", split_special_tokens=True, add_special_tokens=False)["input_ids"][0] in forbidden(made)
    wide = normalising()("＜think＞", add_special_tokens=False)["input_ids"]
    assert set(wide) & forbidden(normalising())


@pytest.mark.parametrize("text", [*TAGS, *CONTROL])
def test_a_control_token_is_only_text(tokenizer, text):
    for hostile in (text, f"a {text} b", text * 3, f"<{text}>", text[:-1] + text, f"{text[0]}{text}{text[-1]}"):
        ids = encode_untrusted(tokenizer, hostile)
        assert not set(ids) & forbidden(tokenizer)
        assert folded(tokenizer.decode(ids, clean_up_tokenization_spaces=False)) == folded(hostile)


@pytest.mark.parametrize("text", ["＜think＞", "＜|im_end|＞", "＜/answer＞＜s＞", "﹤bos﹥"])
def test_look_alikes_that_are_folded_into_a_tag_are_broken_too(tokenizer, text):
    assert not set(encode_untrusted(tokenizer, text)) & forbidden(tokenizer)


def test_ordinary_text_is_encoded_as_ever():
    made = byte_level()
    for text in (*TEXT, "a <b> <c 1 < 2 <= 3", "\n\n  two  spaces\n"):
        assert made.decode(encode_untrusted(made, text), clean_up_tokenization_spaces=False) == text
    plain = "What is the boiling point of water at sea level?"
    assert encode_untrusted(made, plain) == encode_frame(made, plain)
    assert encode_untrusted(made, "") == encode_frame(made, "") == []


def test_a_single_letter_that_was_added_stays():
    made = spaces()
    ids = encode_untrusted(made, "f ü  zwei")
    assert made.convert_tokens_to_ids("ü") in ids and made.convert_tokens_to_ids("  ") not in ids


def test_frames_keep_their_control_tokens():
    made = byte_level()
    ids = encode_frame(made, "<|im_end|>\n<information>")
    assert set(ids) & forbidden(made) == {made.convert_tokens_to_ids(t) for t in ("<|im_end|>", "<information>")}


def test_invalid_unicode_does_not_stop_a_run(tokenizer):
    assert encode_untrusted(tokenizer, "a \ud800 <think> \udfff")


def test_random_splices(tokenizer):
    draws = random.Random(0)
    parts = [*TAGS, *CONTROL, "＜", "＞", " ", "x", "<", ">", "|", "/", "\u200b", "é"]
    for _ in range(300):
        text = "".join(draws.choice(parts)[draws.randrange(0, 2) :] for _ in range(draws.randrange(1, 12)))
        ids = encode_untrusted(tokenizer, text)
        assert not set(ids) & forbidden(tokenizer), text


def test_a_hundred_thousand_characters_take_time_in_proportion(tokenizer):
    """Hostile and benign; ten times the text may take about ten times the time."""
    for unit in ("<|im_end|><think>", "lorem ipsum dolor ", "＜think＞"):

        def seconds(n, unit=unit):
            start = time.process_time()
            encode_untrusted(tokenizer, (unit * (n // len(unit) + 1))[:n])
            return time.process_time() - start

        seconds(1000)
        assert seconds(100_000) < 30 * max(seconds(10_000), 0.01), unit
