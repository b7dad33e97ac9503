"""What a run prints: lines with the right numbers, and nothing that a user can do nothing about."""

import logging
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
from core_helpers import config
from core_helpers import trainer as made
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from srpo.trainer import progress
from srpo.trainer.metrics import world_metrics
from srpo.trainer.progress import Progress, check_report_to, duration, line, phase, quiet, show_progress


def test_a_line_has_the_few_numbers() -> None:
    logs = {
        "reward": 0.31249,
        "correct/mean": 0.5,
        "cost/per_query_usd": 2.14e-5,
        "invalid/share": 0.03125,
        "loss": 9.0,
    }
    assert line(logs, 5, 60, tokens_per_second=1234.4, seconds_left=200) == (
        "step 5/60 | reward 0.312 | score 0.500 | $2.14e-05/query | invalid 3.1 % | 1,234 tokens/s | 3 min left"
    )
    assert line({"loss": 1.5}, 2, 2, seconds_left=0) == "step 2/2 | loss 1.500 | done"
    assert line({"reward": None, "correct/mean": float("nan")}, 1, 2) == "step 1/2", "what is not there is left out"


@pytest.mark.parametrize(
    ("seconds", "text"), [(3.4, "3 s"), (99, "99 s"), (150, "2 min"), (5940, "99 min"), (12_000, "3 h 20 min")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_the_share_of_invalid_turns() -> None:
    assert world_metrics({"format_error": ["", "no tag", None, ""]})["invalid/share"] == pytest.approx(1 / 3)


class Kept(TrainerCallback):
    """What transformers gave its callbacks, which is what W&B and the others get."""

    def __init__(self) -> None:
        self.logs: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.logs.append(dict(logs))


def test_a_run_prints_one_line_per_log(tmp_path: Path, capfd: Any) -> None:
    quiet()
    trainer = made(config(tmp_path, max_steps=4, logging_steps=2, disable_tqdm=False))
    kept = Kept()
    trainer.add_callback(kept)
    show_progress(trainer, "train")
    kinds = [type(callback) for callback in trainer.callback_handler.callbacks]
    assert Progress in kinds and ProgressCallback not in kinds and PrinterCallback not in kinds
    trainer.train()
    out, err = capfd.readouterr()
    lines = out.splitlines()
    assert len(lines) == 2 and "\r" not in out + err and "{" not in out
    assert [text.split(" | ")[0] for text in lines] == ["[train] step 2/4", "[train] step 4/4"]
    assert f"reward {kept.logs[0]['reward']:.3f}" in lines[0] and lines[1].endswith(" | done")
    assert len(kept.logs[0]) > 15, "all metrics go where report_to says"
    seen = [log["num_tokens"] for log in kept.logs if "num_tokens" in log]
    speeds = [int(re.search(r"([\d,]+) tokens/s", text)[1].replace(",", "")) for text in lines]  # type: ignore[index]
    assert len(seen) == 2 and all(0 < speed < seen[0] * 1000 for speed in speeds)


def test_it_listens_to_what_is_listed_only(caplog: Any) -> None:
    quiet()
    quiet()
    with warnings.catch_warnings(record=True) as heard:
        for category, message in progress._WARNINGS:
            warnings.warn(re.sub(r"\\(.)", r"\1", message), category, stacklevel=1)
        warnings.warn("pin_memory: another matter", UserWarning, stacklevel=1)
    assert [str(one.message) for one in heard] == ["pin_memory: another matter"]
    logger = logging.getLogger("DeepSpeed")
    logger.addHandler(caplog.handler)
    logger.warning("Setting accelerator to CPU. If you have GPU or other accelerator, we were unable to detect it.")
    logger.warning("the loss scale is at its minimum")
    logger.removeHandler(caplog.handler)
    assert {record.getMessage() for record in caplog.records} == {"the loss scale is at its minimum"}
    assert len([one for one in logger.filters if isinstance(one, progress._Leave)]) == 1


def test_a_report_target_that_is_not_installed_is_one_sentence(monkeypatch: Any) -> None:
    real = progress.importlib.util.find_spec
    monkeypatch.setattr(progress.importlib.util, "find_spec", lambda name: None if name != "wandb" else real(name))
    check_report_to(["none"])
    check_report_to("wandb")
    for target in ("tensorboard", "trackio"):
        with pytest.raises(ValueError, match=f"report_to: {target} needs a package .*: pip install {target}"):
            check_report_to([target])


def test_the_first_process_speaks(monkeypatch: Any, capsys: Any) -> None:
    phase("start", "16 rows")
    monkeypatch.setenv("RANK", "1")
    phase("start", "16 rows")
    assert capsys.readouterr().out == "[start] 16 rows\n"
