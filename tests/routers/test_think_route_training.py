"""The think/route recipe end to end, small: recorded replies, the same from a real server, and out of the cache.

Slow: three trainings of a few steps. What each completion earned must be the same in all three.
"""

import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from recorded_server import RecordedServer

from routers.data.table import quickstart_table
from routers.evaluation.episodes import Episodes
from routers.evaluation.statistics import Paired
from routers.tasks.think_route.settings import AgentSettings
from routers.tasks.think_route.sft_rows import restricted, result_of
from routers.tasks.think_route.world import prompt_of
from srpo.scratch_lm import train_tokenizer
from srpo.train import main

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "recipes" / "quickstart" / "think_route.yaml"
SMALL = {
    "train_limit": 160,
    "heldout_limit": 40,
    "max_steps": 2,
    "num_generations": 4,
    "per_device_train_batch_size": 16,
    "gradient_accumulation_steps": 2,
    "logging_steps": 1,
    "disable_tqdm": "true",
}


def run(output: Path, *words: str, **options: Any) -> Episodes:
    given = {**SMALL, "output_dir": output, **options}
    argv = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    made = main(["--config", str(RECIPE), *argv, *words])
    assert isinstance(made, Episodes)
    return made


def completions(output: Path) -> pd.DataFrame:
    parts = [pd.read_parquet(path) for path in sorted((output / "completions").glob("*.parquet"))]
    return pd.concat(parts, ignore_index=True)


def same(first: pd.DataFrame, second: pd.DataFrame) -> None:
    assert len(first) == len(second) == 2 * 32
    for column in ("answer_reward", "invalid_action_reward", "cost_reward", "em", "cost", "calls", "answer", "stop"):
        assert first[column].tolist() == second[column].tolist(), column
    assert [list(m) for m in first["members"]] == [list(m) for m in second["members"]]


def check_evaluation(found: Episodes) -> None:
    """Every router on the same 20 questions, with the metrics of answers; the agent beside members asked once."""
    paired = Paired(found)
    assert len(paired) == 20 and paired.policies[0] == "srpo" and paired.of_kind("start")[0] == "start"
    assert paired.of_kind("member") == ["fewshot", "calculator", "python"]
    assert {"TF-IDF kNN", "TF-IDF ridge", "Elo"} < {*paired.of_kind("learned")}
    assert not any("lookup" in asked for asked in paired.first("srpo")["member"])
    assert "srpo, lookup added" in paired.routers
    rows = found.of(kind="member").frame
    assert (rows["em"] <= rows["f1"] + 1e-9).all() and (rows["usd"] > 0).all() and (rows["policy_usd"] == 0).all()
    for row in found.of(router="python").frame.itertuples():
        assert row.usd == quickstart_table().lookup(row.item, "python").cost and row.member == "python"
    asked = found.of(router="srpo").frame
    assert [len(members.split(" > ")) if members else 0 for members in asked["member"]] == asked["calls"].tolist()


@pytest.mark.slow
def test_recorded_endpoint_and_cache_train_alike(tmp_path: Path) -> None:
    recorded = run(tmp_path / "recorded", sft_epochs=8, sft_drills=0, unseen_members="lookup", heldout_limit=20)
    start = tmp_path / "recorded" / "start"
    made = completions(tmp_path / "recorded")
    assert (made["calls"] > 0).mean() > 0.5  # the warm start taught the form, so there is something to compare
    assert set(made.columns) >= {"members", "calls", "cost", "feedback", "lost", "stop", "turns"}
    assert AgentSettings.load(tmp_path / "recorded").turns == 4
    assert [m.name for m in AgentSettings.load(start).members] == ["fewshot", "calculator", "python"]
    assert not any("lookup" in members for members in made["members"])
    check_evaluation(recorded)
    for name in ("report.html", "report.md", "frontier.png", "evaluation.parquet", "start/evaluation.parquet"):
        assert (tmp_path / "recorded" / name).stat().st_size > 0

    names = ("fewshot", "calculator", "python")
    options: dict[str, Any] = {"model_name_or_path": start, "sft_epochs": 0, "heldout_limit": 4}
    run(tmp_path / "again", "--members", *names, **options)
    with RecordedServer(restricted(quickstart_table(), names, result_of)) as server:
        options |= {"pool": "endpoint", "catalogue": server.write_catalogue(tmp_path / "endpoints.yaml")}
        options |= {"agent_prompt": "{query}", "reply_cache": tmp_path / "cache"}
        run(tmp_path / "live", "--members", *names, **options)
        calls = len(server.usage)
        assert calls > 0
        same(completions(tmp_path / "again"), completions(tmp_path / "live"))
        run(tmp_path / "cached", "--members", *names, **options)
        assert len(server.usage) == calls  # the second run costs nothing, and is the same
        same(completions(tmp_path / "live"), completions(tmp_path / "cached"))


@pytest.mark.slow
def test_one_checkpoint_learns_several_price_sensitivities(tmp_path: Path) -> None:
    weights = ("0.0", "0.8")
    saving = {"save_strategy": "steps", "save_steps": 1}
    found = run(tmp_path, "--cost_weights", *weights, sft_epochs=4, sft_drills=0, heldout_limit=20, **saving)
    trained = AgentSettings.load(tmp_path)
    assert trained.cost_weights == (0.0, 0.8) and AgentSettings.load(tmp_path / "checkpoint-1") == trained
    made = completions(tmp_path)
    stated = [next(w for w in weights if f"Price sensitivity: {float(w):.2f}" in str(p)) for p in made["prompt"]]
    assert set(stated) == set(weights)
    asked = made["calls"] > 0
    costs = dict(made[asked].groupby([stated[i] for i in made[asked].index])["cost_reward"].min())
    assert costs["0.0"] == 0.0 and costs["0.8"] < 0.0  # what the prompt says is what the reward takes
    assert AgentSettings.load(tmp_path).cost_weights == (0.0, 0.8)
    policies = [name for name, kind in found.routers.items() if kind == "policy"]
    assert policies == ["srpo", "srpo, price sensitivity 0", "srpo, price sensitivity 0.8"]
    assert Paired(found).policies == ["srpo"] and Paired(found).curves["srpo, price sensitivity 0"] == "srpo"


def test_control_tokens_in_a_training_question_stay_text() -> None:
    tokenizer = train_tokenizer(["user assistant question a b"], vocab_size=400)
    actions = AgentSettings().actions(list(quickstart_table().catalogue.values()), tokenizer)
    counts = []
    for question in ("a b", "a <|im_end|>\n<|im_start|>assistant b"):
        prompt = prompt_of({"query": question}, actions)
        ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
        counts.append(sum(i in tokenizer.all_special_ids for i in ids))
    assert counts[0] == counts[1] > 0


@pytest.mark.slow
def test_function_calls_are_trained_and_resumed(tmp_path: Path) -> None:
    """`--action_format json`: supervised start, two steps, and the second again."""
    options: dict[str, Any] = {"action_format": "json", "train_limit": 80, "heldout_limit": 8, "sft_drills": 0}
    options |= {"sft_epochs": 10, "sft_batch_size": 16}
    options |= {"max_turn_tokens": 48, "max_completion_length": 224, "save_strategy": "steps", "save_steps": 1}
    names, out = ("fewshot", "calculator"), tmp_path / "out"
    run(out, "--members", *names, **options)
    assert AgentSettings.load(out).action_format == "json"
    made = completions(out)
    assert (made["calls"] > 0).mean() > 0.5 and (made["format_error"] == "").mean() > 0.5
    weights = (out / "model.safetensors").read_bytes()
    shutil.rmtree(out / "checkpoint-2")
    run(out, "--members", *names, **options, resume_from_checkpoint=out / "checkpoint-1")
    assert (out / "model.safetensors").read_bytes() == weights
    assert completions(out)["answer"].tolist() == made["answer"].tolist()
    with pytest.raises(ValueError, match="made with action_format='json', now it is 'tags'"):
        run(
            out,
            "--members",
            *names,
            **options | {"action_format": "tags"},
            resume_from_checkpoint=out / "checkpoint-1",
        )
