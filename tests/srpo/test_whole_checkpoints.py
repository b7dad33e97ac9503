"""A checkpoint is whole or not there: killed at any file of a save, cut, flipped, on a full disk; with a real trainer.

Killed saves run in forks of one process with a trainer in it: an audit hook ends the fork at the n-th time that Python
opens, makes, renames or removes anything, and a timer at any time between.
"""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from core_helpers import config, dataset, equal, model, trainer, weights
from resume_cases import reward
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils.logging import disable_progress_bar

from srpo.hub.files import files_to_push
from srpo.hub.upload import push_checkpoint
from srpo.policy_name import check_policy_name
from srpo.run.whole import MANIFEST, NotWhole, fault, newest, read_manifest, resume_from, rotate, seal, whole_looking
from srpo.trainer.checkpoint import SaveFailed


def made(folder: Path, heldout: Any = None, **changes: Any) -> Any:
    """A run with everything that a checkpoint may hold: optimiser, teacher, and the rest of a generation batch."""
    settings: dict[str, Any] = {
        "objective": "srpo", "per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "max_steps": 3,
        "steps_per_generation": 4, "optim": "adamw_torch", "learning_rate": 3e-3, "save_strategy": "steps",
        "save_steps": 1, "save_total_limit": 1,
    }  # fmt: skip
    args = config(folder, **{**settings, **changes})
    return trainer(args, model(), rewards=reward, rollout_func=None, train_dataset=dataset(24), heldout=heldout)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Three steps, checkpoint-3 alone is kept."""
    trained = made(tmp_path_factory.mktemp("run") / "out")
    trained.train()
    return trained


@pytest.fixture
def saved(run: Any, tmp_path: Path) -> Path:
    return Path(shutil.copytree(Path(run.args.output_dir) / "checkpoint-3", tmp_path / "checkpoint-3"))


def in_a_fork(act: Callable[[], object]) -> int:
    """The exit code (negative: the signal) of a fork that does nothing else."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            disable_progress_bar()  # its lock is shared by processes: one that is killed would keep it
            act()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


# ------------------------------------------------------------------------------------------------- what is whole


def test_a_checkpoint_lists_every_file(run: Any) -> None:
    folder = Path(run.args.output_dir)
    assert sorted(path.name for path in folder.glob("*checkpoint*")) == ["checkpoint-3"], "older ones have gone"
    files = {path.name for path in (folder / "checkpoint-3").iterdir()} - {MANIFEST}
    assert {"model.safetensors", "optimizer.pt", "teacher.safetensors", "rollouts_0.safetensors"} < files
    assert files == {*read_manifest(folder / "checkpoint-3")} and fault(folder / "checkpoint-3") is None
    assert not any((folder / "_saving").iterdir())


def test_the_policy_that_a_run_ends_with_is_looked_at_before_it_is_loaded_or_pushed(run: Any) -> None:
    folder = Path(run.args.output_dir)
    run.save_beside = lambda place: (place / "router.yaml").write_text("kind: x")
    run.save_model()
    (folder / "README.md").write_text("what comes later is not of the policy")
    listed = read_manifest(folder)
    assert {"model.safetensors", "config.json", "tokenizer.json", "router.yaml"} <= {*listed}
    assert not {*listed} & {"README.md", "trainer_state.json", "training_args.bin", "run.json"}
    assert not [name for name in listed if "/" in name]
    check_policy_name(str(folder))
    for name in listed:
        path, content = folder / name, (folder / name).read_bytes()
        flipped = bytearray(content)
        flipped[len(content) // 2] ^= 0x40
        for damaged in (None, content[:-1], bytes(flipped)):
            path.unlink()
            if damaged is not None:
                path.write_bytes(damaged)
            for look in (lambda: check_policy_name(str(folder)), lambda: files_to_push(folder)):
                if name != "config.json" or damaged is not None:
                    with pytest.raises((FileNotFoundError, ValueError), match=f"^{folder} cannot be .*{path} "):
                        look()
            path.write_bytes(content)
    check_policy_name(str(folder))
    run.save_model()  # written anew, and listed anew
    assert read_manifest(folder) == listed and fault(folder / "checkpoint-3") is None
    (folder / MANIFEST).unlink()
    (folder / "model.safetensors").write_bytes(b"of another tool")
    check_policy_name(str(folder))  # without a manifest nothing is known


def names(run: Any) -> list[str]:
    return sorted(path.name for path in (Path(run.args.output_dir) / "checkpoint-3").iterdir())


def test_each_file_missing_cut_flipped_or_extra_is_found_and_named(run: Any, saved: Path) -> None:
    for name in names(run):
        path, content = saved / name, (saved / name).read_bytes()
        flipped = bytearray(content)
        flipped[int(len(content) * 0.7)] ^= 0x40
        for damaged in (None, content[: len(content) // 2], bytes(flipped)):
            path.unlink()
            if damaged is not None:
                path.write_bytes(damaged)
            assert str(path) in str(fault(saved))
            path.write_bytes(content)
    assert fault(saved) is None
    (saved / "notes.txt").write_text("mine")
    assert "notes.txt is none of its files" in str(fault(saved))


def test_a_damaged_or_foreign_checkpoint_is_refused_before_anything_is_loaded(run: Any, saved: Path) -> None:
    before = weights(run.model)
    path = saved / "teacher.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    with pytest.raises(NotWhole, match=r"teacher.safetensors does not hold what was written"):
        run.train(resume_from_checkpoint=str(saved))
    (saved / MANIFEST).unlink()
    with pytest.raises(NotWhole, match=r"manifest.json is missing: another tool or an older version wrote"):
        run.train(resume_from_checkpoint=str(saved))
    with pytest.raises(NotWhole, match="holds no whole checkpoint"):
        resume_from("true", saved.parent)
    assert resume_from("auto", saved.parent) is None and equal(before, weights(run.model))


def test_auto_takes_the_newest_whole_one_and_says_what_it_passed_over(saved: Path, capsys: Any) -> None:
    for step in (10, 20, 30):
        shutil.copytree(saved, saved.parent / f"checkpoint-{step}")
    (saved.parent / "checkpoint-30" / "optimizer.pt").unlink()
    (saved.parent / "checkpoint-20" / "rng_state.pth").write_bytes(b"short")
    assert resume_from("auto", saved.parent) == str(saved.parent / "checkpoint-10")
    said = capsys.readouterr().out
    assert "checkpoint-30 is passed over: " in said and "optimizer.pt is missing" in said
    assert "rng_state.pth has 5 bytes" in said and "[resume] " in said


def test_only_whole_ones_are_counted_when_old_ones_go(saved: Path) -> None:
    for step in (4, 5, 6, 9):
        shutil.copytree(saved, saved.parent / f"checkpoint-{step}")
    (saved.parent / "checkpoint-9" / MANIFEST).unlink()
    rotate(saved.parent, 2, str(saved))
    assert [*whole_looking(saved.parent)] == [3, 6] and (saved.parent / "checkpoint-9").is_dir()
    rotate(saved.parent, 1, None)
    assert [*whole_looking(saved.parent)] == [6]


def test_the_checkpoint_of_the_best_evaluation_is_kept(tmp_path: Path) -> None:
    rewards = iter([0.1, 0.9, float("nan"), 0.3, 0.5])
    changes = {"eval_strategy": "steps", "eval_steps": 1}
    run = made(tmp_path, heldout=lambda: {"reward": next(rewards)}, max_steps=4, **changes)
    run.train()
    best = str(tmp_path / "checkpoint-2")
    assert [*whole_looking(tmp_path)] == [2, 4] and run.state.best_model_checkpoint == best
    assert [entry["eval_reward"] for entry in run.state.log_history if "eval_reward" in entry][1] == 0.9
    rest = made(tmp_path, heldout=lambda: {"reward": next(rewards)}, max_steps=5, **changes)
    rest.train(resume_from_checkpoint="auto")
    assert [*whole_looking(tmp_path)] == [2, 5] and rest.state.best_model_checkpoint == best
    assert all(fault(path) is None for path in whole_looking(tmp_path).values())


def test_only_whole_policies_are_served_and_pushed(saved: Path) -> None:
    check_policy_name(str(saved))
    (saved / "optimizer.pt").unlink()  # a policy does without
    check_policy_name(str(saved))
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(FileNotFoundError, match=r"cannot be used: .*model.safetensors has .* and .* were written"):
        check_policy_name(str(saved))
    with pytest.raises(ValueError, match=r"model.safetensors has"):
        push_checkpoint(saved, "me/router")


# -------------------------------------------------------------------------------------------------- killed saves


CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.scandir", "shutil.rmtree")


def at_changes(then: Callable[[int], object]) -> None:
    """From now on, `then` learns of every file that this process opens to write, makes, renames or takes away."""
    count = 0

    def hook(name: str, args: tuple[Any, ...]) -> None:
        nonlocal count
        if name in CHANGES or (name == "open" and isinstance(args[1], str) and {*args[1]} & {*"wxa+"}):
            count += 1
            then(count)

    sys.addaudithook(hook)


def die_at(change: int) -> None:
    at_changes(lambda count: os.kill(os.getpid(), signal.SIGKILL) if count == change else None)


def save_as(run: Any, folder: Path, step: int = 4) -> None:
    run.args.output_dir, run.state.global_step = str(folder), step
    run._save_checkpoint(run.model, None)


def changes_of_a_save(run: Any, folder: Path) -> int:
    shutil.copytree(Path(run.args.output_dir) / "checkpoint-3", folder / "checkpoint-3")
    told = folder.parent / "changes.txt"

    def act() -> None:
        counted = []
        at_changes(counted.append)
        save_as(run, folder)
        told.write_text(str(counted[-1]))

    assert in_a_fork(act) == 0
    return int(told.read_text())


def survives(folder: Path) -> int:
    """The step that a killed save leaves to resume from, with all that must hold of it."""
    found = newest(folder)
    assert found is not None and fault(found) is None
    assert get_last_checkpoint(str(folder)) == str(found), "what transformers finds is whole too"
    return int(found.name.removeprefix("checkpoint-"))


def killed_saves(run: Any, tmp_path: Path, moments: list[Callable[[], object]]) -> list[int]:
    steps = []
    for i, moment in enumerate(moments):
        folder = tmp_path / str(i)
        shutil.copytree(Path(run.args.output_dir) / "checkpoint-3", folder / "checkpoint-3")

        def act(moment: Callable[[], object] = moment, folder: Path = folder) -> None:
            moment()
            save_as(run, folder)

        assert in_a_fork(act) in (0, -signal.SIGKILL)
        steps.append(survives(folder))
        shutil.rmtree(folder)
    return steps


def test_a_save_that_is_killed_at_a_file_leaves_a_whole_checkpoint(run: Any, tmp_path: Path) -> None:
    changes = changes_of_a_save(run, tmp_path / "count")
    assert changes > 30
    chosen = sorted({1 + i * (changes - 1) // 14 for i in range(15)})
    steps = killed_saves(run, tmp_path, [lambda n=n: die_at(n) for n in chosen])
    assert {*steps} == {3, 4} and steps == sorted(steps), "the new one, once it is there"


@pytest.mark.slow
def test_a_save_that_is_killed_anywhere_leaves_a_whole_checkpoint(run: Any, tmp_path: Path) -> None:
    began = time.monotonic()
    changes = changes_of_a_save(run, tmp_path / "count")
    seconds = time.monotonic() - began
    steps = killed_saves(run, tmp_path, [lambda n=n: die_at(n) for n in range(1, changes + 1)])
    assert {*steps} == {3, 4} and steps == sorted(steps)

    def after(share: float) -> Callable[[], object]:
        return lambda: threading.Timer(share * seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()

    assert {*killed_saves(run, tmp_path, [after(1.2 * i / 100) for i in range(100)])} <= {3, 4}


def test_a_run_whose_save_was_killed_goes_on_bitwise(run: Any, tmp_path: Path) -> None:
    whole = made(tmp_path / "whole", max_steps=6)
    whole.train()
    folder = tmp_path / "out"
    shutil.copytree(Path(run.args.output_dir) / "checkpoint-3", folder / "checkpoint-3")

    def act() -> None:
        die_at(12)
        save_as(run, folder)

    assert in_a_fork(act) == -signal.SIGKILL
    assert any((folder / "_saving").iterdir()), "it was killed in the middle"
    rest = made(folder, max_steps=6)
    rest.train(resume_from_checkpoint="auto")
    assert equal(weights(whole.model), weights(rest.model))
    assert [*whole_looking(folder)] == [6] and not any((folder / "_saving").iterdir())


# ------------------------------------------------------------------------------------------------- full disks


def refused(run: Any, folder: Path, largest: int) -> str:
    """What a save says where no file may be larger."""
    told = folder.parent / f"{folder.name}.txt"

    def act() -> None:
        descriptor = os.open(told, os.O_WRONLY | os.O_CREAT)
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
        try:
            save_as(run, folder)
        except SaveFailed as error:
            os.write(descriptor, str(error).encode())

    assert in_a_fork(act) == 0
    return told.read_text()


def test_a_save_that_does_not_fit_names_its_folder_and_changes_nothing(run: Any, tmp_path: Path) -> None:
    sizes = sorted({size for size, _ in read_manifest(Path(run.args.output_dir) / "checkpoint-3").values()})
    for largest in (2048, *(size - 1 for size in sizes if size > 4096)):
        folder = tmp_path / str(largest)
        shutil.copytree(Path(run.args.output_dir) / "checkpoint-3", folder / "checkpoint-3")
        words = refused(run, folder, largest)
        assert f"{folder}/checkpoint-4 could not be written" in words and "bytes are free there" in words
        assert f"auto goes on from {folder}/checkpoint-3" in words and survives(folder) == 3
        assert not (folder / "_saving").exists()


@pytest.mark.slow
def test_a_full_disk(run: Any, tmp_path: Path) -> None:
    """Ten sizes of a real file system; needs the right to mount one."""
    one = sum(size for size, _ in read_manifest(Path(run.args.output_dir) / "checkpoint-3").values())
    disk = tmp_path / "disk"
    disk.mkdir()
    for i in range(10):
        size = int(one * (1.1 + 0.09 * i)) + 60_000
        mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)]
        if subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("no right to mount a file system")
        try:
            shutil.copytree(Path(run.args.output_dir) / "checkpoint-3", disk / "out" / "checkpoint-3")
            told = tmp_path / "told.txt"

            def act(told: Path = told) -> None:
                try:
                    save_as(run, disk / "out")
                except SaveFailed as error:
                    told.write_text(str(error))

            assert in_a_fork(act) == 0
            assert "checkpoint-4 could not be written" in told.read_text() and survives(disk / "out") == 3
        finally:
            subprocess.run(["umount", str(disk)], check=True)


def test_a_manifest_is_not_taken_for_another_s(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.bin").write_bytes(b"123")
    seal(tmp_path / "a")
    document = json.loads((tmp_path / "a" / MANIFEST).read_text())
    document["files"]["x.bin"][0] = 4
    (tmp_path / "a" / MANIFEST).write_text(json.dumps(document))
    assert "manifest.json is damaged" in str(fault(tmp_path / "a"))
