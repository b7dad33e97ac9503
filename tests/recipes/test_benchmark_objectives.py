"""The comparison of objectives: its task, its exact numbers and its table by hand, and all of it once in small."""

import math
from types import SimpleNamespace

import benchmark_objectives as bench
import numpy as np
import pytest
import torch


def test_answers_are_two_and_the_reward_takes_no_other():
    right = ["u02556679", "d97665520"]
    assert bench.answers((5, 6, 6, 7, 9, 0, 2, 5)) == right
    said = [*right, "u97665520", "u0255667", "u025566799", " u02556679", ""]
    completions = [[{"role": "assistant", "content": text}] for text in said]
    assert bench.right(completions, [right] * len(said)) == [1, 1, 0, 0, 0, 0, 0]


def test_no_question_is_held_out_and_trained_on():
    class Repeats:
        def integers(self, low, high, size):
            return np.arange(size[0])[:, None] % 10 * np.ones((1, 8), dtype=int)

    drawn = bench.draw(Repeats(), 12, {(digit,) * 8 for digit in range(7)})
    assert len(drawn) == 12 and {question[0] for question in drawn} == {7, 8, 9}


class Sure:
    """Gives the tokens that follow in its input a logit of 7, and those of the last row 0; all others have 0."""

    def eval(self):
        pass

    def __call__(self, ids, use_cache):
        logits = 7.0 * torch.nn.functional.one_hot(ids.roll(-1, dims=1), 50 + int(ids.max())).float()
        logits[-1] = 0
        return SimpleNamespace(logits=logits)


@pytest.mark.parametrize("told", [False, True])
def test_held_out_numbers_are_exact(told):
    held = bench.HeldOut([(5, 6, 6, 7, 9, 0, 2, 5), (1,) * 8], told=told)
    said = bench.tokenizer().decode(held.ids[0])
    assert said.endswith("assistant\nu02556679<|im_end|>") and said.count("u02556679") == 1 + told
    tokens = 50 + int(held.ids.max())
    p, q = math.exp(7) / (math.exp(7) + tokens - 1), 1 / tokens
    sure, flat = -p * math.log(p) - (1 - p) * math.log((1 - p) / (tokens - 1)), math.log(tokens)
    found = held.read(Sure())
    assert held.length == 10  # a letter, eight digits, the end
    assert found["right"] == pytest.approx([2 * p**10, p**10 + q**10], rel=1e-4)
    assert found["up"] == pytest.approx([0.5, 1.0], rel=1e-4)
    assert found["entropy"] == pytest.approx([sure, (sure + flat) / 2], rel=1e-4)
    assert found["greedy"].tolist() == [1, 1]  # one of the answers is enough


def made(right, **others):
    return {"right": right, "items": [[p, p] for p in right], "every": 10, "rate": 1e-3, "greedy": right} | others


def test_the_table_pairs_seeds_and_questions():
    same = {"up": [0.5, 0.6], "entropy": [0.5, 0.25]}
    same |= {"completions/mean_length": [10.0], "srpo/distilled_share": [None]}
    found = {
        "GRPO": [made([0.25, 0.5], **same), made([0.25, 0.75], **same)],
        "SRPO": [made([0.25, 0.625], **same), made([0.25, 0.875], **same)],
    }
    lines = bench.table(found, [0, 10])
    assert [cell.strip() for cell in lines[2].split("|")][1:9] == [
        "GRPO", "0.001", "25.0", "25.0 [25.0, 25.0]", "62.5 [50.0, 75.0]", "62.5 (10)", "62.5", "60.0",
    ]  # fmt: skip
    assert lines[-1] == "| SRPO - GRPO | +0.0 [+0.0, +0.0] | +12.5 [+12.5, +12.5] |"


def test_the_benchmark_runs_once_in_small(tmp_path, capsys):
    out, picture = tmp_path / "runs" / "out.jsonl", tmp_path / "picture.png"
    size = ["--steps", "2", "--every", "1", "--at", "1", "--seeds", "1", "--start-rows", "64", "--questions", "4"]
    size += ["--objectives", "SDPO", "SRPO, no weights"]
    command = [*size, "--rates", "0.001", "--out", str(out), "--picture", str(picture)]
    said, kept = bench.main(command), out.read_text()
    assert picture.stat().st_size and len(kept.splitlines()) == 2 + 2  # SDPO and SRPO of the validation seed
    rows = [line.split(" | ")[0] for line in said.splitlines() if " | 0.001 | " in line]
    assert rows == ["| SDPO", "| SRPO, no weights"]
    assert bench.main(command) == said and out.read_text() == kept  # nothing is made again
    with pytest.raises(SystemExit):
        bench.main(["--steps", "5", "--every", "2"])
    assert "step 10 has no evaluation" in capsys.readouterr().err
