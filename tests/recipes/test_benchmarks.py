"""The benchmarks of training speed: their counts by hand, and each of them once in small."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from benchmark_common import load_tokenizer, make_model, make_prompts, prefix_tokens, token_limit
from benchmark_step import main as step_main
from transformers import AutoModelForCausalLM


def test_tokens_that_all_rows_begin_with_count_once():
    assert prefix_tokens([[1, 2, 3], [1, 2, 4], [1, 2], [5]]) == 5  # 1 2 3, 4, 5
    assert prefix_tokens([[1], [1], []]) == 1 and prefix_tokens([]) == 0
    # 8 rows of 400 + 48, of which 400 + 8 x 48 are different; and two such groups with 300 in common.
    one, ends = [list(range(400))] * 8, [[7] * 48] * 8
    assert token_limit(one, ends) == pytest.approx(8 * 448 / (400 + 8 * 48))
    other = [[*range(300), *range(1000, 1100)]] * 8
    assert token_limit(one + other, ends * 2) == pytest.approx(16 * 448 / (300 + 100 + 100 + 16 * 48))


@pytest.mark.parametrize("name", ["tiny", "moe"])
def test_a_model_from_nothing_ends_after_so_many_tokens_and_prompts_have_their_length(name, tmp_path):
    folder = make_model(name, str(tmp_path), ends_after=16)
    tokenizer, model = load_tokenizer(folder), AutoModelForCausalLM.from_pretrained(folder)
    rows = make_prompts(tokenizer, 3, 80, common=40)["prompt"]
    prompts = [tokenizer.apply_chat_template(row, add_generation_prompt=True, return_dict=False) for row in rows]
    assert all(78 <= len(ids) <= 82 for ids in prompts) and 110 < prefix_tokens(prompts) < 175
    with torch.no_grad():
        chance = model(torch.tensor([ids[:78] for ids in prompts])).logits.softmax(-1)
    ends = chance[..., tokenizer.eos_token_id]
    assert ends.mean() == pytest.approx(1 / 16, rel=0.25) and ends.min() > 1 / 32 and ends.max() < 1 / 8
    assert chance[..., len(tokenizer) :].sum() == 0 or chance[..., len(tokenizer) :].max() < 1e-6


def test_a_shape_that_splits_groups_is_refused(capsys):
    with pytest.raises(SystemExit):
        step_main(["--rows", "32", "--micro-batch", "12"])
    assert "whole groups of 8" in capsys.readouterr().err


SMALL = {
    "benchmark_step": [
        "--trainers",
        "trl-grpo",
        "grpo",
        "srpo",
        "trl-sdpo",
        "sdpo",
        "--rows",
        "8",
        "--micro-batch",
        "8",
    ],
    "benchmark_rollout": ["--model", "tiny", "--prompts", "2", "--tokens", "4"],
}


@pytest.mark.slow
@pytest.mark.parametrize("script", list(SMALL))
def test_a_benchmark_prints_its_table(script, repository):
    shape = ["--prompt-tokens", "40", "--group", "4", "--repeats", "1"]
    shape += ["--steps", "2", "--completion-tokens", "8"] if script == "benchmark_step" else []
    command = [sys.executable, Path(repository, "scripts", f"{script}.py"), *SMALL[script], *shape]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=540)
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in done.stdout.splitlines() if line[0] == "|"
    ]
    if script == "benchmark_step":
        last = rows[-5:]
        assert [row[2] for row in last] == ["trl-grpo", "grpo", "srpo", "trl-sdpo", "sdpo"]
        assert last[0][8:10] == ["1.00", "1.00"] and last[1][1] == last[2][1]  # ours sample the same tokens
        assert all(float(cell) >= 0 for row in last for cell in row[3:10])
    else:
        assert [row[1].split(" / ")[1] for row in rows[-2:]] == ["1 x 4", "3 x 4"]
        for row in rows[-2:]:
            theirs, ours = row[6].split(", ")
            assert theirs == ours and float(row[4]) > 0  # the same number of tokens on both sides


@pytest.mark.slow
def test_the_gpu_benchmark_runs_in_small(repository, tmp_path):
    out = tmp_path / "small.json"
    command = [sys.executable, Path(repository, "scripts", "benchmark_gpu.py"), "--small", "--out", out]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=540, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    )
    assert done.returncode == 0, done.stderr[-4000:]
    parts = json.loads(out.read_text())["parts"]
    assert all("result" in part for part in parts.values()), parts
    for model in ("tiny", "moe"):
        found = parts[f"exactness {model}"]["result"]
        assert found["log-probs, nats"]["shared against plain, both fp32"]["max"] < 1e-4 and found["exact enough"]
        assert [record["trainer"] for record in parts[f"steps {model}"]["result"]] == ["trl-grpo", "grpo", "srpo"]
    assert parts["attention"]["result"]["largest difference"] < 1e-4
