"""A training that would make no step, or made none, is an error in the trainer itself."""

import json
from pathlib import Path

import pytest
from core_helpers import config, dataset, trainer

from srpo.run.steps import NoSteps, check_rows_of_a_batch, check_steps_made


@pytest.mark.parametrize(
    "changes", [{}, {"max_steps": -1}, {"dataloader_drop_last": True}, {"steps_per_generation": 2}]
)
def test_too_few_rows_for_one_batch_are_refused_before_anything_starts(tmp_path: Path, changes: dict) -> None:
    rows = 7 if "steps_per_generation" in changes else 3  # a batch is 16 / 4 rows, or twice that
    made = trainer(config(tmp_path, objective="grpo", **changes), train_dataset=dataset(16).select(range(rows)))
    needed = 8 if "steps_per_generation" in changes else 4
    with pytest.raises(NoSteps, match=f"has {rows} usable rows, and one batch of rollouts takes {needed}: per_device"):
        made.train()
    assert made.state.global_step == 0


def test_as_many_rows_as_one_batch_takes_are_enough(tmp_path: Path) -> None:
    made = trainer(config(tmp_path, objective="grpo"), train_dataset=dataset(16).select(range(4)))
    made.train()
    assert made.state.global_step == 1


def test_the_arithmetic_counts_all_processes(tmp_path: Path) -> None:
    args = config(tmp_path)
    args.generation_batch_size *= 3  # of three processes, as TRL counts them
    with pytest.raises(NoSteps, match="takes 12: per_device_train_batch_size 16 x 3 processes"):
        check_rows_of_a_batch(11, args)
    check_rows_of_a_batch(12, args)


def test_a_training_that_made_no_step_never_ends_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = trainer(config(tmp_path, objective="grpo"))
    monkeypatch.setattr(made, "get_train_dataloader", lambda: [])
    with pytest.raises((NoSteps, ValueError)):
        made.train()
    with pytest.raises(NoSteps, match="the warm start made no step"):
        check_steps_made(0, "the warm start")


def test_an_evaluation_without_rows_is_refused(tmp_path: Path) -> None:
    made = trainer(config(tmp_path, objective="grpo", per_device_eval_batch_size=16), eval_dataset=dataset(4))
    with pytest.raises(NoSteps, match="the evaluation data has 0 rows"):
        made.evaluate(dataset(4).select([]))
    made.args.dataloader_drop_last = True
    with pytest.raises(NoSteps, match="has 3 rows: not one batch of 16 completions, 4 per row"):
        made.evaluate(dataset(4).select(range(3)))


def test_a_checkpoint_that_is_none_or_too_late_is_named(tmp_path: Path) -> None:
    made = trainer(config(tmp_path, objective="grpo", max_steps=2))
    with pytest.raises(FileNotFoundError, match=r"checkpoint-9 does not exist; there is no checkpoint beside it"):
        made.train(resume_from_checkpoint=str(tmp_path / "checkpoint-9"))
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-3" / "trainer_state.json").write_text(json.dumps({"global_step": 3}))
    with pytest.raises(NoSteps, match="is of step 3 already, and max_steps is 2: raise max_steps"):
        made.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    with pytest.raises(FileNotFoundError, match=r"there are .*checkpoint-3"):
        made.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
