"""Publishing works against a real server, and nothing that the Hub does ends a run."""

import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from hub_server import HubServer
from router_helpers import QUESTIONS, right

from srpo.hub import upload
from srpo.hub.card import costs_of, merged_card, model_card
from srpo.hub.errors import explain
from srpo.hub.files import LOADED, files_to_push
from srpo.hub.hub import HubMixin
from srpo.hub.upload import NotPushed
from srpo.losses import noted
from srpo.redact import REDACTED, redacted, scrubbed
from srpo.run.signals import HEARD
from srpo.run.whole import seal

HERE = Path(__file__).resolve().parents[1] / "support"


def worked(model: Path, work: Path, what: str) -> dict[str, Any]:
    """What tests/support/hub_worker.py found. huggingface_hub reads its settings when it is imported, so this cannot
    run in the test's own process."""
    path = os.pathsep.join([str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        [sys.executable, str(HERE / "hub_worker.py"), str(model), str(work), what],
        capture_output=True, text=True, timeout=900, env={**os.environ, "PYTHONPATH": path}, cwd=work,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def outcomes(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What happened in a process that trained against a Hub that works."""
    return worked(tiny_model_dir, tmp_path_factory.mktemp("hub"), "run")


@pytest.fixture(scope="module")
def refused(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The same where it refuses (401), is out of order or is gone; "ok": nothing is pushed."""
    return worked(tiny_model_dir, tmp_path_factory.mktemp("hub"), "refused")


@pytest.mark.slow  # some 80 pushes
def test_every_fault_at_every_kind_of_request_is_survived(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Pushed in the end, verified, by one commit, and the weights sent once more only where they did not arrive."""
    found = worked(tiny_model_dir, tmp_path, "faults")
    for status, said in (("400", "BadRequestError"), ("401", "HTTP 401): log in"), ("403", "HTTP 403): log in")):
        name, words, requests = found.pop(status)
        assert said in words and requests == 1, (status, name)  # nothing that would not pass is tried again
    spoilt = found.pop("put, wrong bytes")
    assert spoilt == ["NotPushed: the Hub holds another model.safetensors than was sent, 3 times", False, 3, 1, True]
    assert found.pop("commit, wrong bytes") == ["pushed", True, 2, 1, True]
    for case, (told, same, commits, puts, met) in found.items():
        assert (told, same, commits, met) == ("pushed", True, 1, True), case
        assert puts == (2 if case.startswith("put") else 1), case
    assert len(found) == 9 * 9


def test_a_pushed_folder_arrives_byte_for_byte_and_without_pickles(outcomes: dict[str, Any]) -> None:
    folder = outcomes["folder"]
    names = ("README.md", "config.json", "model.safetensors")
    assert folder["received"] == {f"me/small:{name}": folder["local"][name] for name in names}
    assert "/me/small/commit/" in folder["url"]


def test_a_second_push_sends_what_has_changed_and_nothing_else(outcomes: dict[str, Any]) -> None:
    folder = outcomes["folder"]
    url, asked = folder["again"]
    assert url == folder["url"] and asked["info"] == 1 and not {"commit", "preupload", "put"} & {*asked}
    assert folder["changed"] == '{"changed": 1}'
    assert folder["puts"] == 1 + 4  # the weights once, also where two folders have them; the state of resuming


def test_a_resumable_push_adds_what_resuming_needs_but_not_the_arguments(outcomes: dict[str, Any]) -> None:
    state = ["optimizer.pt", "rng_state.pth", "scheduler.pt", "teacher.safetensors"]
    wanted = sorted(["README.md", "config.json", "model.safetensors", *state])
    assert outcomes["folder"]["resumable"] == [f"me/small:last-checkpoint/{name}" for name in wanted]


def test_a_run_pushes_at_every_save_and_at_the_end(outcomes: dict[str, Any]) -> None:
    run = outcomes["ok"]
    assert run["steps"] == 2 and run["push"] is True and run["logs"] == [] == run["losses"]
    # A save during an upload is skipped, as in transformers, so the second message may be missing on a busy machine.
    assert run["messages"][0] == "Training in progress, step 1" and run["messages"][-1] == "End of training"
    received = {name.removeprefix("me/router:"): sha for name, sha in run["received"].items()}
    saved = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    policy = {"README.md", *saved, "router.yaml", "prices.txt"}
    for name in policy:
        assert received[name] == run["local"][name]
    # A run's folder holds much else (see hub_worker.MUCH_ELSE): none of it is public.
    assert received.keys() - policy <= {"generation_config.json", "chat_template.jinja"}
    assert run["staged"] == []


def test_the_card_on_the_hub_tells_what_was_done_and_no_secret(outcomes: dict[str, Any]) -> None:
    run = outcomes["ok"]
    card = run["remote_card"]
    assert card == run["card"]
    assert "`grpo`" in card and "2402.03300" in card and "| held-out | 0.61 |" in card
    assert "learning_rate: 1.0e-06" in card and REDACTED in card
    assert "Canary" not in card and run["leaks"] == 0
    assert str(HERE) not in card


@pytest.mark.slow  # three runs, which wait for the Hub until the deadline
@pytest.mark.parametrize(
    ("mode", "words"),
    [
        ("401", "the Hub refused the credentials (HTTP 401): log in"),
        ("503", "the Hub has a problem of its own (HTTP 503)"),
        ("gone", "the Hub cannot be reached"),
    ],
)
def test_training_goes_on_whatever_the_hub_does(refused: dict[str, Any], mode: str, words: str) -> None:
    run = refused[mode]
    assert run["steps"] == 2 and run["push"] is False
    # The weights are those of a run that does not push: the failures changed nothing.
    assert run["local"]["model.safetensors"] == refused["ok"]["local"]["model.safetensors"]
    assert words in run["logs"][0] and "Training goes on, and the first push tries again" in run["logs"][0]
    assert words in run["logs"][-1] and "By hand: srpo push " in run["logs"][-1] and "me/router" in run["logs"][-1]
    assert not any("Canary" in line for line in run["logs"])
    [lost] = run["losses"]
    assert (lost["what"], lost["count"], lost["step"]) == ("pushes", 1, 2) and words in next(iter(lost["why"]))
    assert run["received"] == {} and run["staged"] == []


@pytest.mark.slow  # loads torch, trains a tiny router, and loads three models from a Hub on loopback
def test_what_was_pushed_loads_with_plain_libraries_and_as_a_router(tiny_model_dir: Path, tmp_path: Path) -> None:
    found = worked(tiny_model_dir, tmp_path, "loads")
    assert found.pop("moved") > 1e-2  # the adapter does something
    for name, (difference, routes, _) in found.items():
        assert difference <= 1e-5, name
        assert [member for member, _ in routes] == [right(question) for question in QUESTIONS], name
    scores = {
        name: [score for _, scores in routes for score in scores.values()] for name, (_, routes, _) in found.items()
    }
    assert scores["adapter"] == pytest.approx(scores["merged"], abs=1e-5)
    assert max(abs(a - b) for a, b in zip(scores["adapter"], scores["whole"], strict=True)) > 1e-3
    # The card of the merged one is that of a whole model, and else the adapter's.
    old, new = found["adapter"][2], found["merged"][2]
    assert (metadata(old)["library_name"], metadata(new)["library_name"]) == ("peft", "transformers")
    assert 'load_router("me/merged")' in new and "me/adapter" not in new and "adapter_model" not in new
    assert "| `model.safetensors` |" in new and "| `adapter_model.safetensors` |" in old
    for section in ("Objective", "Held-out results", "How it was trained", "Limits"):
        assert part(old, section) == part(new, section) != ""


def part(card: str, heading: str) -> str:
    return card.partition(f"## {heading}\n")[2].partition("\n## ")[0]


def test_a_merged_models_card_loads_it_whole_and_a_strangers_card_is_no_such() -> None:
    card = model_card(objective="grpo", model_name="r", base_model="a/b", adapter=True, repo_id="me/r", command=["x"])
    found = merged_card(card, repo_id="me/whole", hashes={})
    assert (
        found is not None
        and 'AutoModelForCausalLM.from_pretrained("me/whole")' in found
        and "eft" not in part(found, "How to use it")
    )
    assert merged_card("# mine\n", hashes={}) is None
    assert merged_card("---\ntags: [lora]\n---\n# mine\n", hashes={}) is None


def of_a_user(tmp_path: Path, endpoint: str) -> dict[str, str]:
    """An environment, with a Hub that is somewhere."""
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
    return environment | {"HF_TOKEN": "hf_mine", "HF_HOME": str(tmp_path / "hf")}


def test_a_push_of_a_run_that_is_told_to_end_is_finished(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text("weights")
    with HubServer() as hub:
        hub.always["*"] = 503
        words = [str(tmp_path), "me/router", "--deadline=300"]
        push = subprocess.Popen(
            [sys.executable, "-m", "srpo.hub.push", *words], env=of_a_user(tmp_path, hub.endpoint), cwd=tmp_path
        )
        while not hub.seen:
            time.sleep(0.05)
        for number in HEARD:
            push.send_signal(number)
        hub.always.clear()
        assert push.wait(300) == 0 and hub.files["me/router:model.safetensors"] == b"weights"


def trained(tmp_path: Path, endpoint: str, *words: object) -> subprocess.CompletedProcess[str]:
    """`srpo train ...` in a process of its own, pushing to that Hub."""
    given = ("--push_to_hub", "true", "--hub_model_id", "me/router", "--output_dir", tmp_path / "out")
    return subprocess.run(
        [sys.executable, "-m", "srpo", "train", *map(str, (*words, *given))],
        capture_output=True, text=True, timeout=600, env=of_a_user(tmp_path, endpoint), cwd=tmp_path,
    )  # fmt: skip


def is_finished_but_not_on_the_hub(done: subprocess.CompletedProcess[str], output: Path, why: str) -> None:
    said = done.stdout + done.stderr
    assert done.returncode == 75, said[-3000:]
    assert said.count("STOPPED: the run is finished and not on the Hub: srpo push") == 1 and why in said, said[-3000:]
    assert said.count("sends what is missing") == 1 and "Traceback" not in said
    assert json.loads((output / "run.json").read_text())["finished"]
    assert (output / "report.html").is_file() and (output / "evaluation.parquet").is_file()
    assert [(lost["what"], lost["count"]) for lost in noted(output)] == [("pushes", 1)]


@pytest.mark.slow  # imports everything twice, in two processes
def test_a_run_that_the_hub_refuses_is_whole_and_ends_with_75(tmp_path: Path) -> None:
    recipe = ("quickstart/encoder", "--max_steps", 5, "--cost_weights", 0.2, "--heldout_limit", 20)
    with HubServer() as hub:
        hub.always["*"] = 401
        done = trained(tmp_path, hub.endpoint, *recipe)
    is_finished_but_not_on_the_hub(done, tmp_path / "out", "the Hub refused the credentials (HTTP 401)")


@pytest.mark.slow  # two processes, which train, evaluate, and wait for the Hub
@pytest.mark.distributed
def test_all_processes_of_a_run_that_is_not_on_the_hub_end_with_75(tmp_path: Path) -> None:
    given: dict[str, object] = {
        "model_name_or_path": "tiny", "sft_epochs": 0, "bf16": "false", "num_generations": 2, "max_steps": 1,
        "per_device_train_batch_size": 2, "max_completion_length": 12, "train_limit": 20, "heldout_limit": 4,
        "save_strategy": "no", "report_to": "none", "hub_deadline": 45, "hang_deadline": 30,
    }  # fmt: skip
    words = [word for key, value in given.items() for word in (f"--{key}", str(value))]
    with HubServer() as hub:  # the push takes longer than any part of a step may, and the other waits all the same
        hub.always["*"] = 503
        done = trained(tmp_path, hub.endpoint, "--processes", 2, "quickstart/grpo", *words)
    is_finished_but_not_on_the_hub(done, tmp_path / "out", "the Hub has a problem of its own (HTTP 503)")


def test_what_of_a_checkpoint_goes_up(tmp_path: Path) -> None:
    policy = ["README.md", "adapter_config.json", "adapter_model.safetensors", "tokenizer.json"]
    state = ["environment_0.json", "global_step1/a.pt", "optimizer.pt", "reference.safetensors", "teacher.safetensors"]
    local = ["_own", "completions/a.parquet", "quarantine.jsonl", "quarantine-1.jsonl", "training_args.bin"]
    for name in (*policy, *state, *local, "checkpoint-1/model.safetensors", "a[1].txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    assert files_to_push(tmp_path) == policy
    assert files_to_push(tmp_path, beside=["a[1].txt"]) == sorted([*policy, "a[1].txt"])
    assert files_to_push(tmp_path, resumable=True) == sorted([*policy, *state, "a[1].txt"])
    (tmp_path / "run.json").write_text("{}")
    seal(tmp_path, only=LOADED)
    assert files_to_push(tmp_path, resumable=True) == policy, "OUTPUT itself, `srpo push OUTPUT NAME --into FOLDER`"
    (tmp_path / "tokenizer.json").write_text("xy")
    with pytest.raises(ValueError, match=r"tokenizer.json has 2 bytes, and 1 were .*delete manifest.json there"):
        files_to_push(tmp_path)


def test_a_folder_without_a_policy_is_not_pushed(tmp_path: Path) -> None:
    for name in ("config.json", "teacher.safetensors", "start/model.safetensors"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    with pytest.raises(ValueError, match="holds no weights of a policy"):
        files_to_push(tmp_path)


def test_an_adapter_of_a_local_model_is_said_to_need_it(
    tiny_model_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    class Bare(HubMixin):
        def __init__(self, model: Any) -> None:
            self.model = model

    policy = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model_dir), LoraConfig(r=2))
    with caplog.at_level(logging.WARNING):
        Bare(policy)._say_if_the_base_stays_here()
    assert f"without the model that it changes, which is a folder of this machine, {tiny_model_dir}" in caplog.text


def test_what_passes_is_tried_again_until_the_deadline_and_longer_where_the_hub_asks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waits: list[float] = []
    clock = SimpleNamespace(monotonic=lambda: sum(waits), sleep=waits.append)
    monkeypatch.setattr(upload, "time", clock)
    slow = OSError("slow down")
    slow.response = SimpleNamespace(status_code=429, headers={"Retry-After": "7"})  # type: ignore[attr-defined]
    errors: list[Exception] = [ConnectionError("no route"), slow, ConnectionResetError("reset")]

    def act() -> str:
        if errors:
            raise errors.pop(0)
        return "commit"

    assert upload.tried(act, 100.0) == "commit" and waits == [1.0, 7.0, 4.0]
    errors += [ConnectionError("no route")] * 20
    waits.clear()
    with pytest.raises(
        NotPushed, match=r"the Hub cannot be reached \[ConnectionError: no route\], and went on for 20 s"
    ):
        upload.tried(act, 20.0)
    assert waits == [1.0, 2.0, 4.0, 8.0] and NotPushed.code == 75
    errors[:] = [ValueError("mine"), KeyError("x")]
    with pytest.raises(ValueError, match="mine"):
        upload.tried(act, 20.0)


def test_an_explanation_looks_at_the_cause_and_hides_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "swordfish-9")
    response = type("Response", (), {"status_code": 429})
    cause = OSError("slow down")
    cause.response = response  # type: ignore[attr-defined]
    error = RuntimeError("upload with hf_abcdefghijklmnopqrstuv and swordfish-9 failed\nmore")
    error.__cause__ = cause
    text = explain(error)
    assert "HTTP 429" in text and "abcdef" not in text and "swordfish" not in text and "more" not in text
    assert explain(ValueError("x")) == "unexpected error [ValueError: x]"


# ----------------------------------------------------------------------------------------------------- model card


def metadata(card: str) -> dict[str, Any]:
    assert card.startswith("---\n")
    return yaml.safe_load(card.split("---\n")[1])


@pytest.mark.parametrize(
    ("objective", "papers"),
    [
        ("grpo", {"2402.03300"}),
        ("sdpo", {"2601.20802"}),
        ("srpo", {"2604.02288", "2601.20802", "2402.03300"}),
    ],
)
def test_the_card_cites_the_papers_of_its_objective(objective: str, papers: set[str]) -> None:
    card = model_card(objective=objective, model_name="router", base_model="Qwen/Qwen3-4B", command=["x"])
    assert {number for number in ("2402.03300", "2601.20802", "2604.02288") if number in card} == papers
    data = metadata(card)
    assert data["base_model"] == "Qwen/Qwen3-4B" and objective in data["tags"] and "trl" in data["tags"]
    assert data["library_name"] == "transformers" and data["pipeline_tag"] == "text-generation"


def test_an_adapter_is_loaded_with_peft_on_its_base() -> None:
    card = model_card(
        objective="srpo", model_name="r", base_model="Qwen/Qwen3-4B", adapter=True, repo_id="me/r", command=["x"]
    )
    assert metadata(card)["library_name"] == "peft"
    assert 'AutoModelForCausalLM.from_pretrained("Qwen/Qwen3-4B")' in card
    assert 'PeftModel.from_pretrained(base, "me/r")' in card
    code = card.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")  # an example that is not even Python helps nobody


def test_the_card_holds_a_recipe_that_can_be_read_back_and_says_when_nothing_was_evaluated() -> None:
    recipe = {"objective": "srpo", "learning_rate": 5e-6, "hub_token": "abc", "members": ["a", "b"]}
    card = model_card(objective="srpo", model_name="r", recipe=recipe, command=["train.py", "--config", "a b.yaml"])
    block = card.split("```yaml\n")[1].split("```")[0]
    assert yaml.safe_load(block) == {**recipe, "hub_token": REDACTED}
    assert "Not evaluated yet." in card and "train.py --config 'a b.yaml'" in card


def test_results_are_read_by_the_hubs_own_reader_and_files_can_be_checked() -> None:
    from huggingface_hub import ModelCard

    card = model_card(
        objective="srpo",
        model_name="r",
        command=["x"],
        results=[{"name": "srpo", "dataset": "held-out", "metrics": {"right answers": 0.61, "USD per query": 2e-5}}],
        picture="frontier.png",
        costs=costs_of([{"train_runtime": 61.2, "cost/spent_usd": 1.5}, {"loss": 1.0}], 12345),
        hashes={"model.safetensors": "0a" * 32},
    )
    found = ModelCard(card).data.eval_results
    assert [(one.metric_type, one.metric_value, one.dataset_name, one.metric_name) for one in found] == [
        ("right answers", 0.61, "held-out", "srpo: right answers"),
        ("USD per query", 2e-5, "held-out", "srpo: USD per query"),
    ]
    assert (
        "![Score and cost of every router](frontier.png)" in card
        and f"| `model.safetensors` | `{'0a' * 32}` |" in card
    )
    assert "It took 12,345 tokens read and written, 61 s of training, $1.5000 for calls." in card


def test_an_unknown_objective_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown objective 'ppo'"):
        model_card(objective="ppo", model_name="r")


def test_redaction_reaches_every_depth_and_leaves_the_rest() -> None:
    mapping = {"a": [{"api_key": "x"}, "hf_" + "Ab1" * 8], "pad_token": "<pad>", "n": 3, "revision": "0a" * 20}
    assert redacted(mapping) == {
        "a": [{"api_key": REDACTED}, REDACTED], "pad_token": "<pad>", "n": 3, "revision": "0a" * 20
    }  # fmt: skip


def test_scrubbing_removes_what_the_environment_keeps_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_SERVICE_TOKEN", "correct horse")
    monkeypatch.setenv("MY_SERVICE_URL", "http://somewhere")
    assert scrubbed("say correct horse to http://somewhere") == f"say {REDACTED} to http://somewhere"
