"""The tiny model, its supervised start, and the evaluation of what comes out."""

import math
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from routers.baselines.play import table_baselines
from routers.data.catalogue import Member
from routers.data.table import ReplyTable
from routers.evaluation.episodes import Episodes, RewardRule
from routers.evaluation.statistics import Paired
from routers.language.grammar import Grammar, parse
from routers.language.prompts import policy_prompt
from routers.tasks.query_routing.evaluate import evaluate_policy
from routers.tasks.query_routing.router import routing
from routers.tasks.query_routing.settings import QuerySettings
from routers.tasks.query_routing.sft_rows import drawn, sft_turns, soft_labels
from srpo.rollout.shared import load_checkpoint
from srpo.scratch_lm import tiny_causal_lm, train_tokenizer
from srpo.task import Share

CATALOGUE = {
    "chat": Member("chat", "facts", 1.0, 1.0),
    "calculator": Member("calculator", "sums", 2.0, 2.0),
    "lookup": Member("lookup", "spelling", 3.0, 3.0),
}
MEMBERS = list(CATALOGUE.values())
GRAMMAR = Grammar()
TAGS = ["<think>", "</think>", "<route>", "</route>"]
WORDS = "apple bridge candle dragon engine forest garden hammer island jacket kitchen ladder".split()
FORMS = {
    "facts": "What is the capital of the land of {word} {n}?",
    "sums": "Calculate {n} plus {m}",
    "spelling": "Spell the word {word} backwards {n} times",
}


def rows() -> list[dict[str, Any]]:
    """360 queries; on each family one member is right, and "chat" also on every fifth query of any family."""
    rng, found = random.Random(0), []
    for i in range(360):
        family, member = list(zip(FORMS, CATALOGUE, strict=True))[i % 3]
        query = FORMS[family].format(word=rng.choice(WORDS), n=1000 + i, m=rng.randint(10, 999))
        split = "heldout" if i // 3 % 3 == 2 else "train"
        for name in CATALOGUE:
            right = name == member or (name == "chat" and i % 5 == 0)
            found.append(
                {"query_id": f"q{i}", "query": query, "family": family, "split": split}
                | {"member": name, "reply": "x", "prompt_tokens": 10, "completion_tokens": 0, "correct": float(right)}
            )
    return found


def made_rows(queries: Any, correct: np.ndarray, rng: np.random.Generator, **how: Any) -> Any:
    right = correct if correct.shape[1] == 3 else correct.T
    utility = (right - 0.2 * np.array([1, 2, 3]) / 3).reshape(correct.shape)
    prompt = lambda query: policy_prompt(query["query"], MEMBERS)  # noqa: E731
    return sft_turns(queries, correct, utility, prompt, list(CATALOGUE), GRAMMAR, rng, **how)


@pytest.fixture(scope="module")
def table() -> ReplyTable:
    return ReplyTable(rows(), CATALOGUE)


@pytest.fixture(scope="module")
def tokenizer(table: ReplyTable) -> Any:
    texts = [policy_prompt(query["query"], MEMBERS)[0]["content"] for query in table.queries("train")]
    return train_tokenizer(texts, vocab_size=500, whole=TAGS)


@pytest.fixture(scope="module")
def policy(table: ReplyTable, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model after its warm start, saved."""
    from trl import SFTConfig

    from srpo.sft import encode_turn, sft

    folder = tmp_path_factory.mktemp("policy")
    turns = made_rows(table.queries("train"), table.correct_matrix("train"), np.random.default_rng(0))
    examples = [encode_turn(turn, tokenizer, [tokenizer.eos_token_id]) for turn in turns]
    args = SFTConfig(
        output_dir=str(folder),
        num_train_epochs=4,
        per_device_train_batch_size=16,
        learning_rate=5e-3,
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        max_length=None,
    )
    model = tiny_causal_lm(tokenizer, hidden=64, layers=2, heads=2, intermediate=128)
    model = sft(model, tokenizer, examples, args)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


# --- tokenizer and model ---------------------------------------------------------------------------------------------


def test_any_text_survives_the_tokenizer(tokenizer: Any) -> None:
    for text in (
        "Spell apple",
        " two  spaces\n\ttab ",
        "<think>x</think><route>chat</route>",
        "é 漢字 🤖 \x00",
        "1234567",
    ):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_the_tokenizer_is_deterministic(table: ReplyTable, tokenizer: Any) -> None:
    texts = [policy_prompt(query["query"], MEMBERS)[0]["content"] for query in table.queries("train")]
    again = train_tokenizer(texts, vocab_size=500, whole=TAGS)
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    assert len(tokenizer) <= 500


def test_tags_are_one_token_and_digits_stand_alone(tokenizer: Any) -> None:
    assert tokenizer.tokenize("<think>12345</think>") == ["<think>", *"12345", "</think>"]
    assert tokenizer.decode(tokenizer("<route>")["input_ids"], skip_special_tokens=True) == "<route>"
    assert len({tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}) == 3


def test_the_chat_template(tokenizer: Any) -> None:
    messages = [{"role": "user", "content": "Hi <b>"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert prompt == "<|im_start|>user\nHi <b><|im_end|>\n<|im_start|>assistant\n"
    whole = tokenizer.apply_chat_template([*messages, {"role": "assistant", "content": "Yo"}], tokenize=False)
    assert whole == prompt + "Yo<|im_end|>\n"


def test_a_members_name_is_one_token_where_it_is_a_word() -> None:
    names = ["chat", "chat-4.1 pro", "a"]
    tokenizer = train_tokenizer(["chats about a banana"], vocab_size=300, whole=[*TAGS, *names])
    for name in names:
        assert tokenizer.tokenize(f"<route>{name}</route>") == ["<route>", name, "</route>"]
    text = "chats, a chat about a banana"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert [token for token in tokenizer.convert_ids_to_tokens(ids) if token in names] == ["a", "chat", "a"]


def test_the_vocabulary_must_hold_the_bytes() -> None:
    with pytest.raises(ValueError, match="too small"):
        train_tokenizer(["x"], vocab_size=259, whole=["<think>"])


def test_the_tiny_model_is_small_seeded_and_leaves_the_random_state_alone(tokenizer: Any) -> None:
    state = torch.random.get_rng_state()
    first, same, other = (tiny_causal_lm(tokenizer, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), same.parameters(), strict=True))
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)
    assert first.num_parameters() < 10_000_000 and {p.dtype for p in first.parameters()} == {torch.float32}
    assert first.lm_head.weight is first.model.embed_tokens.weight
    with pytest.raises(ValueError, match="multiple of heads"):
        tiny_causal_lm(tokenizer, hidden=100, heads=6)


# --- warm-start rows -------------------------------------------------------------------------------------------------

QUERIES = [{"query_id": str(i), "query": f"question {i}", "family": "word_sums", "split": "train"} for i in range(4)]
CORRECT = np.array([[1, 1, 0], [0, 0, 1], [0, 0, 0], [1, 0.5, 0]], float)


def mark(prompt: list[dict[str, str]], demonstration: str | None, feedback: str | None) -> list[dict[str, str]]:
    return [{**prompt[0], "content": f"{prompt[0]['content']}|{demonstration}|{feedback}"}]


def test_soft_labels_by_hand() -> None:
    """Two right members a tenth apart, e^(0.1 / T) : 1; nobody right, only cost differs; a fractional score."""
    utility = np.array([[0.9, 0.8, -0.2], [-0.02, -0.2, -0.2], [0.5, 0.5, 0.5]])
    e = math.e
    first = np.array([1, e**-1, e**-11])
    second = np.array([e**1.8, 1, 1])
    expected = [first / first.sum(), second / second.sum(), [1 / 3] * 3]
    np.testing.assert_allclose(soft_labels(utility, 0.1), expected, rtol=1e-9)
    np.testing.assert_allclose(soft_labels(utility, 0.001)[0], [1, 0, 0], atol=1e-12)  # no overflow
    assert soft_labels(utility, 10.0)[0].max() < 0.38, "a high temperature is uniform"


def test_draws_have_their_probabilities_and_share_them_out() -> None:
    probabilities = np.array([[0.5, 0.25, 0.25], [0.6, 0.3, 0.1]])
    found = np.concatenate([drawn(probabilities, 4, np.random.default_rng(seed)) for seed in range(500)])
    assert all(sorted(row) == [0, 0, 1, 2] for row in found[::2].tolist()), "2, 1 and 1 of 4, whatever the draw"
    shares = np.bincount(found[1::2].ravel(), minlength=3) / 2000
    np.testing.assert_allclose(shares, [0.6, 0.3, 0.1], atol=0.02)
    assert drawn(np.array([[0.0, 1.0]]), 3, np.random.default_rng(0)).tolist() == [[1, 1, 1]]


def test_targets_are_drawn_from_the_soft_labels_and_nobodys_queries_teach_what_is_cheap() -> None:
    counts = np.zeros((4, 3))
    for seed in range(500):
        made = made_rows(QUERIES, CORRECT, np.random.default_rng(seed), draws=4)
        assert [row["prompt"][0]["content"][-1] for row in made] == [str(i) for i in range(4) for _ in range(4)]
        for i, row in enumerate(made):
            action = parse(row["completion"][0]["content"], list(CATALOGUE))
            assert action.think == "word sums"
            counts[i // 4, list(CATALOGUE).index(str(action.member))] += 1 / 2000
    # Costs 1/15, 2/15 and 3/15 at T = 0.1: each step in price is a factor e^(2/3).
    dear = math.e ** (-2 / 3)
    assert counts[0] == pytest.approx([1 / (1 + dear), dear / (1 + dear), 0], abs=0.02)
    assert counts[1] == pytest.approx([0, 0, 1], abs=0.01)
    nobody = np.array([1, dear, dear**2]) / (1 + dear + dear**2)
    assert list(made[8]["label"].values()) == pytest.approx(nobody)
    assert counts[2] == pytest.approx(nobody, abs=0.02)
    assert counts[3] == pytest.approx([1 / (1 + dear * math.e**-5), 0, 0], abs=0.02), "half right is worth half"


def test_rows_are_reproducible_and_prompts_are_the_policys() -> None:
    made = [made_rows(QUERIES, CORRECT, np.random.default_rng(5), reprompt=mark) for _ in range(2)]
    assert made[0] == made[1]
    plain = made_rows(QUERIES, CORRECT, np.random.default_rng(5), reprompt=mark, reprompt_share=0.0)
    assert [row["prompt"] for row in plain] == [policy_prompt(query["query"], MEMBERS) for query in QUERIES]


def test_reprompted_rows_agree_with_what_they_show() -> None:
    """A demonstration is the target itself, and right; feedback is on a member that was not fully right, never the
    target. Where nobody is right there is nothing to demonstrate."""
    shown = {"demonstration": 0, "feedback": 0}
    for seed in range(200):
        for row in made_rows(QUERIES, CORRECT, np.random.default_rng(seed), reprompt=mark, reprompt_share=1.0):
            prompt, *told = row["prompt"][0]["content"].split("|")
            query, turn = int(prompt[-1]), row["completion"][0]["content"]
            if not told:
                assert query == 2
            elif told[1] == "None":
                assert told[0] == turn and query != 2
                assert [name for name, p in row["label"].items() if p] == [parse(turn, list(CATALOGUE)).member]
                shown["demonstration"] += 1
            else:
                failed = re.match(r"The route to (\w+) gave", told[1])[1]  # type: ignore[index]
                assert told[0] == "None" and CORRECT[query, list(CATALOGUE).index(failed)] < 1
                assert failed != parse(turn, list(CATALOGUE)).member
                shown["feedback"] += 1
    assert min(shown.values()) > 200


def test_heldout_queries_and_bad_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="'7' is of split 'heldout'"):
        heldout = {"query_id": "7", "query": "x", "family": "f", "split": "heldout"}
        made_rows([heldout], np.ones((1, 3)), np.random.default_rng(0))
    with pytest.raises(ValueError, match="not \\(queries, members\\)"):
        made_rows(QUERIES, CORRECT.T, np.random.default_rng(0))
    with pytest.raises(ValueError, match="must lie in"):
        made_rows(QUERIES, CORRECT, np.random.default_rng(0), reprompt=mark, reprompt_share=1.5)


# --- what was learned, and the evaluation of it ----------------------------------------------------------------------

SETTINGS = QuerySettings(tuple(MEMBERS))


def evaluate(model: Any, tokenizer: Any, table: ReplyTable, name: str = "policy", **how: Any) -> Episodes:
    rule = RewardRule(table.max_cost)
    settings = how.pop("settings", SETTINGS)
    return evaluate_policy(model, tokenizer, table, settings, name=name, rule=rule, **how)


def test_the_supervised_start_learns_the_format_and_the_families(policy: Path, table: ReplyTable) -> None:
    model, tokenizer = load_checkpoint(str(policy))
    untrained = evaluate(tiny_causal_lm(tokenizer, hidden=32, heads=2), tokenizer, table, limit=6)
    assert untrained.frame["valid"].sum() == 0 and set(untrained.frame["member"]) == {""}
    found = evaluate(model, tokenizer, table)
    paired = Paired(Episodes.merged([found, table_baselines(table, RewardRule(table.max_cost))]))
    assert paired.mean("policy", "valid") > 0.97
    simple = [paired.mean(name, "score") for name in paired.of_kind("member", "random")]
    assert paired.mean("policy", "score") > 0.8 > max(simple)


def test_batching_changes_nothing(policy: Path, table: ReplyTable) -> None:
    model, tokenizer = load_checkpoint(str(policy))
    queries = [query["query"] * (i % 4 + 1) for i, query in enumerate(table.queries("heldout")[:9])]
    found = []
    for size in (9, 1):
        with routing(model, tokenizer, SETTINGS, max_batch=size) as router:
            found.append(router.route_all(queries))
    assert [d.members for d in found[0]] == [d.members for d in found[1]]
    for together, alone in zip(*found, strict=True):
        assert (together.text, together.completion_tokens) == (alone.text, alone.completion_tokens)
        assert list(together.scores.values()) == pytest.approx(list(alone.scores.values()), abs=1e-4)


def test_what_an_evaluation_holds_by_the_table(policy: Path, table: ReplyTable) -> None:
    model, tokenizer = load_checkpoint(str(policy))
    state, model = torch.random.get_rng_state(), model.train()
    found = evaluate(model, tokenizer, table, limit=12, policy_price=(1.0, 10.0))
    assert model.training and torch.equal(torch.random.get_rng_state(), state)
    frame, names = found.frame, {query["query_id"]: query for query in table.queries("heldout")}
    assert len(frame) == 12 and frame["family"].nunique() == 3 and set(frame["item"]) <= set(names)
    for row in frame.itertuples():
        assert row.query == names[row.item]["query"] and row.valid == 1.0
        assert row.score == table.lookup(row.item, row.member).correct
        # at least 50 prompt and 5 completion tokens of the policy, in millionths of a dollar, besides the member's
        assert row.policy_usd > (50 + 50) * 1e-6
        assert row.usd == pytest.approx(table.lookup(row.item, row.member).cost + row.policy_usd)
        assert row.reward == pytest.approx(row.score - 0.2 * min(row.usd / table.max_cost, 1))
    assert found.header["rule"]["policy"] == {"cost_scale": table.max_cost, "cost_weight": 0.2, "format_weight": 0.2}
    # shares of two processes are the whole
    parts = [evaluate(model, tokenizer, table, limit=12, share=Share(rank, 2)) for rank in range(2)]
    whole = evaluate(model, tokenizer, table, limit=12)
    assert Episodes.merged(parts).frame.equals(whole.frame)
    train = evaluate(model, tokenizer, table, "start", limit=3, split="train")
    assert train.routers == {"start": "start"} and not set(train.frame["item"]) & set(names)
    none = evaluate(model, tokenizer, table, limit=1, share=Share(1, 2))
    assert len(none) == 0  # more processes than queries


def test_a_lora_adapter_is_evaluated_on_its_base(policy: Path, table: ReplyTable, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model, tokenizer = load_checkpoint(str(policy))
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=2.0)
    adapted.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    expected = evaluate(adapted, tokenizer, table, limit=4).frame
    assert evaluate(*load_checkpoint(str(tmp_path)), table, limit=4).frame.equals(expected)
    assert not expected.equals(evaluate(*load_checkpoint(str(policy)), table, limit=4).frame)


def test_a_policy_that_names_nobody_is_pointed_out(table: ReplyTable, tokenizer: Any, capsys: Any) -> None:
    evaluate(tiny_causal_lm(tokenizer, hidden=32, heads=2), tokenizer, table, limit=3)
    assert "none of 3 turns names a member of this pool (chat, calculator, lookup)" in capsys.readouterr().err


def test_a_split_without_queries_is_an_error(policy: Path) -> None:
    only = ReplyTable([{**row, "split": "train"} for row in rows()], CATALOGUE)
    with pytest.raises(ValueError, match="no query in the split 'heldout'"):
        evaluate(*load_checkpoint(str(policy)), only)
