"""What the task makes of a recipe: prompts and tokens of a policy from nothing, masks, and what a start depends on."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from test_query_routing import CATALOGUE, made_rows, rows
from trl import SFTTrainer

from routers.data.table import ReplyTable
from routers.evaluation.episodes import Outcomes, RewardRule
from routers.tasks.query_routing.sft_rows import foretold, thinned, with_soft_label
from routers.tasks.query_routing.task import QUERY_CHARS, QueryRouting
from srpo.config import SRPOConfig
from srpo.policy import load_policy
from srpo.sft import encode_turn, sft
from srpo.task import RunArguments


def task_of(
    tmp_path: Path, run: dict[str, Any] | None = None, config: dict[str, Any] | None = None, **how: Any
) -> Any:
    settings = {"num_generations": 4, "per_device_train_batch_size": 8, **(config or {})}
    args = SRPOConfig(str(tmp_path), use_cpu=True, bf16=False, **settings)
    task = QueryRouting(QueryRouting.Arguments(**how), RunArguments("query_routing", **run or {}), args)
    task.load(tmp_path)
    return task


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A table whose first query is very long, and its price list, as files."""
    import yaml

    folder = tmp_path_factory.mktemp("pool")
    found = rows()
    for row in found[:3]:
        row["query"] = "begin " + "middle " * 400 + "end"
    pd.DataFrame(found).to_parquet(folder / "table.parquet")
    members = [{"name": m.name, "descriptor": m.descriptor, "price_in": m.price_in, "price_out": m.price_out}
               for m in CATALOGUE.values()]  # fmt: skip
    (folder / "catalogue.yaml").write_text(yaml.safe_dump({"members": members}))
    return {"table": str(folder / "table.parquet")}


def test_a_member_that_is_called_like_a_control_token_is_refused_before_the_training(
    tmp_path: Path, pool: Any, tiny_tokenizer: Any
) -> None:
    """It trained, and the router that was loaded again could not write the name."""
    folder, name = Path(pool["table"]).parent, next(iter(CATALOGUE))
    (tmp_path / "catalogue.yaml").write_text((folder / "catalogue.yaml").read_text().replace(name, "<|im_end|>"))
    found = [{**row, "member": "<|im_end|>" if row["member"] == name else row["member"]} for row in rows()]
    pd.DataFrame(found).to_parquet(tmp_path / "table.parquet")
    task = task_of(tmp_path / "out", table=str(tmp_path / "table.parquet"))
    with pytest.raises(
        ValueError, match=r"the member name '<\|im_end\|>' holds a control token .*: rename the member"
    ):
        task.rows(tiny_tokenizer)


def test_a_policy_from_nothing_writes_four_tokens_and_reads_the_question_only(tmp_path: Path, pool: Any) -> None:
    task = task_of(tmp_path, {"sft_epochs": 1.5}, **pool)
    _, tokenizer = load_policy("tiny", task.config, 0, task.corpus)
    prompts = {row["query_id"]: row["prompt"][0]["content"] for row in task.rows(tokenizer)}
    table: ReplyTable = task.table
    queries = {query["query_id"]: query["query"] for query in table.queries("train")}
    assert prompts["q1"] == queries["q1"]
    assert prompts["q0"].startswith("begin ") and prompts["q0"].endswith("end")
    assert len(prompts["q0"]) == QUERY_CHARS + len(" ... ")
    examples = task.sft_rows(tokenizer, [tokenizer.eos_token_id])
    assert len(examples) == 2 * len(queries) and task.sft_options["num_train_epochs"] == 0.75
    drawn = set()
    for example in examples:
        turn = tokenizer.convert_ids_to_tokens(example["input_ids"][-4:])
        assert turn[0] == "<think>question</think><route>" and turn[2:] == ["</route>", tokenizer.eos_token]
        drawn.add(turn[1])
        assert example["labels"][-3] == -100 and -100 not in example["labels"][-2:]
        places, ids, label = zip(*example["soft"], strict=True)
        assert {*places} == {len(example["labels"]) - 3} and sum(label) == pytest.approx(1)
        assert tokenizer.convert_ids_to_tokens(ids) == list(CATALOGUE)
    assert drawn == set(CATALOGUE)
    mask = task.allowed_tokens(tokenizer)
    frame, *ids = tokenizer.convert_tokens_to_ids(["<think>question</think><route>", *CATALOGUE])
    assert mask.after([]) is None and sorted(mask.after([frame])) == sorted(ids)


def test_words_are_left_out_of_training_prompts_anew_in_every_pass(tmp_path: Path, pool: Any) -> None:
    task = task_of(tmp_path, {"sft_epochs": 3}, word_dropout=0.4, **pool)
    task.config.max_steps = 2 * len(task.queries)  # of two queries each: four passes
    _, tokenizer = load_policy("tiny", task.config, 0, task.corpus)
    whole = {query["query_id"]: query["query"] for query in task.queries}
    assert task.prepare(tmp_path, []) == [], "`srpo evaluate` makes no rows"
    checked = task.rows(tokenizer)
    rows = task.prepare(tmp_path, checked)
    assert len(checked) == len(whole) and len(rows) == 4 * len(whole)
    assert rows == task.prepare(tmp_path, checked), "the same seed, the same rows"
    prompts: dict[str, list[str]] = {}
    for row in rows:
        text = row["prompt"][0]["content"]
        assert row["query"] == whole[row["query_id"]], "the world and the rewards know the query as it is"
        words = iter(whole[row["query_id"]].split())
        assert text and (" ... " in text or all(word in words for word in text.split())), "in their order"
        prompts.setdefault(row["query_id"], []).append(text)
    assert any(len({*texts}) > 1 for texts in prompts.values())
    seen = {tokenizer.decode(row["input_ids"]) for row in task.sft_rows(tokenizer, [tokenizer.eos_token_id])}
    assert len(seen) > len(whole)
    task.config.max_steps = -1
    assert len(task.prepare(tmp_path, checked)) == len(whole)


def test_a_query_without_words_to_spare_stays() -> None:
    rng = np.random.default_rng(0)
    assert thinned("", 0.9, rng) == "" and thinned("one", 0.99, rng) == "one"
    kept = [len(thinned("a b c d e f g h i j", 0.3, rng).split()) for _ in range(300)]
    assert np.mean(kept) == pytest.approx(7, abs=0.4) and min(kept) >= 1


def test_what_is_foretold_of_a_query_does_not_know_its_own_outcomes() -> None:
    """Turning round the outcomes of one query changes what is foretold of others, and not of itself."""
    rng = np.random.default_rng(0)
    items = [{"query_id": str(i), "query": f"{'red' if i % 2 else 'blue'} thing {i}"} for i in range(40)]
    score = np.stack([[float(i % 2), float(1 - i % 2)] for i in range(40)])
    usd, rule = rng.uniform(1, 2, score.shape), RewardRule(2.0)

    def told(score: np.ndarray) -> np.ndarray:
        return foretold(Outcomes(items, ["a", "b"], score, usd, rule(score, usd), rule=rule))[0]

    before = told(score)
    assert ((before[:, 0] > before[:, 1]) == (score[:, 0] > score[:, 1])).mean() > 0.9
    other = score.copy()
    other[7] = 1 - other[7]
    after = told(other)
    assert np.array_equal(after[7], before[7]) and not np.array_equal(after, before)


def test_foretold_labels_are_mixed_in_by_their_share() -> None:
    queries, guessed = [{"query": "x", "split": "train"}], np.array([[0.0, 0.1, -0.1]])
    how: Any = {"guessed": guessed, "share": 0.25, "think": lambda query: "x"}
    [turn] = made_rows(queries, np.array([[1.0, 0.0, 0.0]]), np.random.default_rng(0), **how)
    own, told = (np.exp(np.array(u) / 0.1) for u in ([1 - 0.2 / 3, -0.4 / 3, -0.2], guessed[0]))
    assert [*turn["label"].values()] == pytest.approx(0.75 * own / own.sum() + 0.25 * told / told.sum())


def test_a_pretrained_policy_is_shown_the_pool(tmp_path: Path, pool: Any) -> None:
    task = task_of(tmp_path, {"model_name_or_path": "smollm2"}, **pool)
    [content] = [message["content"] for message in task._prompt({"query": "x" * 2000})]
    assert content.startswith("Who should answer?\nchat $1/1: facts")
    assert content.endswith("\nQuestion: " + "x" * 2000)
    assert not task_of(tmp_path, show_members=False, **pool).settings.show_members


def test_a_trained_policy_is_asked_as_in_its_training(tmp_path: Path, pool: Any) -> None:
    """`srpo evaluate RUN`, and a training from RUN/start, name a folder in place of `tiny`."""
    first = task_of(tmp_path, **pool)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    first.settings.save(tmp_path / "run")
    again = task_of(tmp_path, {"model_name_or_path": str(tmp_path / "run")}, **pool)
    row = first.queries[0]
    assert again.settings == first.settings and again._prompt(row) == first._prompt(row)
    from_start = task_of(tmp_path, {"model_name_or_path": "smollm2", "start_from": str(tmp_path / "run")}, **pool)
    assert from_start._prompt(row) == first._prompt(row)
    assert task_of(
        tmp_path, {"model_name_or_path": str(tmp_path / "run")}, show_members=True, **pool
    ).settings.show_members


def test_routes_are_masked_unless_the_sampler_cannot(tmp_path: Path, pool: Any) -> None:
    task = task_of(tmp_path, **pool)
    _, tokenizer = load_policy("tiny", task.config, 0, task.corpus)
    assert task.allowed_tokens(tokenizer) is not None
    task.config.use_transformers_continuous_batching = True
    assert task.allowed_tokens(tokenizer) is None
    task.arguments.mask_routes = True
    assert task.allowed_tokens(tokenizer) is not None, "who asks for it is told by the trainer that it cannot be"


def test_the_start_depends_on_what_its_labels_are_made_of(tmp_path: Path, pool: Any) -> None:
    """Utilities by hand: tokens cost 1, 2 and 3 USD per million, so asking the cheapest costs a third of a weight."""
    labels = []
    for weight in (0.0, 0.3):
        task = task_of(tmp_path, {"sft_epochs": 1}, cost_weight=weight, **pool)
        _, tokenizer = load_policy("tiny", task.config, 0, task.corpus)
        found = [[p for _, _, p in row["soft"]] for row in task.sft_rows(tokenizer, [tokenizer.eos_token_id])]
        labels.append(dict(zip([query["query_id"] for query in task.table.queries("train")], found, strict=True)))
        assert task.made_from()[0]["cost_weight"] == weight
    free, dear = labels
    hard = [1.0, 0.0, 0.0]  # of a demonstration
    e = math.exp(-10)
    assert free["q2"] in (pytest.approx([e / (1 + 2 * e), e / (1 + 2 * e), 1 / (1 + 2 * e)]), hard[::-1])
    u = np.exp(np.array([1 - 0.1, 1 - 0.2, -0.3]) / 0.1)
    both = [dear[f"q{i}"] for i in range(1, 360, 3) if i % 5 == 0 and i // 3 % 3 != 2]
    assert len(both) > 10 and pytest.approx(u / u.sum()) in both
    assert all(found in (pytest.approx(u / u.sum()), hard, [0.0, 1.0, 0.0]) for found in both)


def test_a_soft_label_is_the_exact_cross_entropy(tmp_path: Path, pool: Any, monkeypatch: Any) -> None:
    """One optimiser step of the supervised start by hand: the loss of two rows, one with a distribution of a name."""
    from trl import SFTConfig

    task = task_of(tmp_path, **pool)
    model, tokenizer = load_policy("tiny", task.config, 0, task.corpus)
    prompt = tokenizer.apply_chat_template(task._prompt({"query": "Spell x"}), add_generation_prompt=True)["input_ids"]
    frame, *names, close = tokenizer.convert_tokens_to_ids(["<think>question</think><route>", *CATALOGUE, "</route>"])
    end = tokenizer.eos_token_id
    hard = {"input_ids": [*prompt, frame, names[1], close, end]}
    hard["labels"] = [*[-100] * len(prompt), frame, names[1], close, end]
    made = {**hard, "labels": list(hard["labels"])}
    soft = with_soft_label(made, task.settings.mask(tokenizer), dict(zip(CATALOGUE, (0.5, 0.2, 0.3), strict=True)))
    with torch.no_grad():
        logp = model(torch.tensor([hard["input_ids"]])).logits[0].log_softmax(-1)[len(prompt) - 1 :]
    tokens = [logp[0, frame], logp[2, close], logp[3, end]]
    name = 0.5 * logp[1, names[0]] + 0.2 * logp[1, names[1]] + 0.3 * logp[1, names[2]]
    expected = -((sum(tokens) + name) / 4 + (sum(tokens) + logp[1, names[1]]) / 4) / 2
    args = SFTConfig(str(tmp_path), max_steps=1, per_device_train_batch_size=2, logging_steps=1, use_cpu=True,
                     bf16=False, report_to="none", save_strategy="no", max_length=None, disable_tqdm=True)  # fmt: skip
    before, logged = model.lm_head.weight.clone(), []
    monkeypatch.setattr(SFTTrainer, "log", lambda trainer, logs, *rest: logged.append(logs.get("loss")))
    sft(model, tokenizer, [soft, hard], args, mean="rows")
    assert logged[0] == pytest.approx(float(expected), abs=1e-4)
    assert not torch.equal(before, model.lm_head.weight)


def test_encode_turn_agrees_with_what_is_sampled(tmp_path: Path, pool: Any) -> None:
    """The frame is one token also where an answer is encoded by itself."""
    task = task_of(tmp_path, **pool)
    _, tokenizer = load_policy("tiny", task.config, 0, task.corpus)
    row = {"prompt": task._prompt({"query": "Calculate 1 plus 2"}),
           "completion": [{"role": "assistant", "content": "<think>question</think><route>chat</route>"}]}  # fmt: skip
    ids = encode_turn(row, tokenizer, [tokenizer.eos_token_id])
    assert tokenizer.decode(ids["input_ids"][-4:-1]) == "<think>question</think><route>chat</route>"


def test_exact_credit_fills_groups_with_every_member(tmp_path: Path, pool: Any) -> None:
    """Refused before a start is trained, where groups cannot hold them."""
    sizes = dict.fromkeys(("num_generations", "per_device_train_batch_size"), 2 * len(CATALOGUE))
    twice = {"objective": "grpo", **sizes}
    task = task_of(tmp_path, {"model_name_or_path": "tiny"}, twice, exact_credit=True, **pool)
    _, tokenizer = load_policy("tiny", task.config, 0, task.corpus)
    assert task.allowed_tokens(tokenizer).alternatives == tuple(CATALOGUE)
    for config, how, told in (
        (twice, {"mask_routes": False}, "exact_credit needs routes among the members' names"),
        ({**twice, "objective": "srpo"}, {}, "set objective: grpo"),
        ({"objective": "grpo"}, {}, f"set num_generations: {2 * len(CATALOGUE)}"),
    ):
        with pytest.raises(ValueError, match=told):
            task_of(tmp_path, {"model_name_or_path": "tiny"}, config, exact_credit=True, **pool, **how)
