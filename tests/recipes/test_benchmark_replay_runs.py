"""The table of native against replayed runs, by hand."""

import pytest
from benchmark_replay_runs import Run, interval, main, table


def test_the_interval_is_student_s():
    # mean 2, sd 1, half width 4.303 / sqrt(3)
    assert interval([1.0, 2.0, 3.0]) == "2 [-0.484, 4.48]"
    assert interval([5.0]) == "5"


def test_differences_are_paired_by_seed():
    runs = [Run(mode, seed, {"x": value}) for mode, seed, value in (
        ("R3", 1, 12.0), ("off", 0, 1.0), ("off", 1, 11.0), ("R3", 0, 2.0), ("R3", 7, 100.0),
    )]  # fmt: skip
    lines = table(runs).splitlines()
    assert lines[0] == "| | off (2 seeds) | R3 (3 seeds) | R3 minus off |"
    assert lines[2].endswith("| 1 [1, 1] |"), "both pairs differ by exactly one"


def test_a_run_without_its_log_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"recipe\.yaml"):
        main([str(tmp_path)])
