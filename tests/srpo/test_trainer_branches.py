"""Who is distilled from what, through the real trainer: the four cases, feedback, truncation, unscorable rows."""

import pytest
import torch
from core_helpers import LENGTH, config, dataset, equal, logged, model, tokenizer, trainer, weights

ROWS = [row for row in dataset().select(range(4)) for _ in range(4)]
MIXED = [
    *(1.0, 1.0, 1.0, 1.0),  # all correct
    *(0.0, 1.0, 0.0, 0.0),  # one correct: nobody can show it anything
    *(0.0, 0.0, 0.0, 0.0),  # all wrong
    *(1.0, 0.0, 0.5, 0.25),  # two correct, by the threshold of 0.5
]
LETTERS = tokenizer()("abcdefghijklmnop", add_special_tokens=False)["input_ids"]


def rollouts(truncated=()):
    """Completion i is the i-th letter, once or as often as fits without an end token."""

    def rollout(prompts, made):
        ids = [[LETTERS[i]] * LENGTH if i in truncated else [LETTERS[i], tokenizer().eos_token_id] for i in range(16)]
        return {"prompt_ids": made._tokenize_prompts(prompts)[0], "completion_ids": ids, "logprobs": None}

    return rollout


def scored(tmp_path, rewards=MIXED, truncated=(), world=None, correctness=None, **changes):
    """A trainer and its scored generation batch of 4 groups of 4, with what the teacher was shown."""
    functions = rewards if isinstance(rewards, list) and callable(rewards[0]) else [lambda completions, **_: rewards]
    made = trainer(
        config(tmp_path, **changes),
        rewards=functions,
        rollout_func=rollouts(truncated),
        world=world,
        correctness=correctness,
    )
    made.current_gradient_accumulation_steps = 1
    made.model.train()
    plans = []
    if made.distiller is not None:
        plan = made.distiller.plan
        made.distiller.plan = lambda *given: plans.append(plan(*given)) or plans[-1]
    batch = made._generate_and_score_completions([dict(row) for row in ROWS])
    return made, batch, plans[0] if plans else None


def distilled(batch):
    return batch["distilled"].nonzero().flatten().tolist()


# ------------------------------------------------------------------------------------------------- the four cases


def test_srpo_routes_failures_that_can_be_shown_something(tmp_path):
    made, batch, plan = scored(tmp_path)
    assert distilled(batch) == [4, 6, 7, 13, 15]
    assert [plan.demonstrations[i] for i in (4, 6, 7)] == ["f", "f", "f"]
    assert [plan.demonstrations[i] for i in (13, 15)] == ["m", "m"]  # the first correct one for all
    assert plan.demonstrations[5] is None  # the only correct one is never shown itself
    assert plan.demonstrations[8:12] == [None] * 4
    assert list(made._logs["extra"]["branch"]) == ["sdpo" if i in (4, 6, 7, 13, 15) else "grpo" for i in range(16)]
    metrics = made._metrics["train"]
    assert metrics["srpo/distilled_share"] == [5 / 16]
    assert metrics["srpo/failed_share"] == [9 / 16]
    assert metrics["srpo/teacher_available"] == [pytest.approx(5 / 9)]


def test_sdpo_distils_correct_ones_too(tmp_path):
    made, batch, plan = scored(tmp_path, objective="sdpo")
    assert distilled(batch) == [0, 1, 2, 3, 4, 6, 7, 12, 13, 14, 15]
    assert plan.demonstrations[:4] == ["b", "a", "a", "a"]
    assert plan.demonstrations[12:] == ["o", "m", "m", "m"]
    assert list(made._logs["extra"]["branch"])[8:12] == [None] * 4


def test_grpo_distils_nothing(tmp_path):
    made, batch, _ = scored(tmp_path, objective="grpo")
    assert "distilled" not in batch and made.teacher is None
    assert list(made._logs["extra"]["branch"]) == ["grpo"] * 16


def test_the_best_demonstration_has_the_highest_reward(tmp_path):
    rewards = [*MIXED[:12], 0.5, 0.0, 0.9, 0.9]
    _, _, plan = scored(tmp_path, rewards, demonstration="best")
    assert plan.demonstrations[12:] == ["o", "o", "p", "o"]  # first on ties, never itself


def test_an_all_wrong_batch_with_binary_rewards_has_no_gradient(tmp_path):
    made = trainer(config(tmp_path, max_steps=2), rewards=lambda completions, **_: [0.0] * len(completions))
    made.train()
    assert equal(weights(made.model), weights(model()))
    assert logged(made, "grad_norm") == [0.0, 0.0] and logged(made, "loss") == [0.0, 0.0]


def test_the_sole_correct_rollout_follows_its_reward(tmp_path):
    made, batch, _ = scored(tmp_path)
    only = {key: value[5:6] if torch.is_tensor(value) and value.ndim else value for key, value in batch.items()}
    only["teacher_hidden"] = batch["teacher_hidden"][5:6]
    loss = made._compute_loss(made.model, only)
    assert batch["advantages"][5] == 0.75
    # ratio 1: -A per token, 2 tokens, over all 16 x 2 tokens
    assert loss.item() == pytest.approx(-0.75 * 2 / 32, rel=1e-6)
    loss.backward()
    assert max(p.grad.abs().max() for p in made.model.parameters()) > 0


# --------------------------------------------------------------------------------- truncated and unscorable rows


@pytest.mark.parametrize("masked", [False, True])
def test_truncated_rollouts_are_never_correct_and_never_shown(tmp_path, masked):
    # 12 has reward 1 but no end; 5 was the only correct one of its group.
    _, batch, plan = scored(tmp_path, truncated=(5, 12), mask_truncated_completions=masked)
    assert plan.demonstrations[4:8] == [None] * 4
    assert plan.demonstrations[12:] == ["o", "o", None, "o"]
    # A truncated failure is distilled, unless all of its tokens are masked.
    assert distilled(batch) == ([13, 15] if masked else [12, 13, 15])


def test_unscorable_rows_are_neither_correct_nor_distilled(tmp_path):
    rewards = [*MIXED[:12], 1.0, None, None, 0.0]
    _, _, plan = scored(tmp_path, rewards, correctness=lambda rewards, _: torch.ones_like(rewards).bool())
    assert plan.demonstrations[12] == "p" and "n" not in plan.demonstrations and "o" not in plan.demonstrations
    _, batch, plan = scored(tmp_path, rewards)
    assert distilled(batch) == [4, 6, 7, 15]
    assert batch["advantages"][[13, 14]].tolist() == [0.0, 0.0]
    assert batch["advantages"][[12, 15]].tolist() == [0.5, -0.5]


def test_rewards_are_summed_with_their_weights(tmp_path):
    parts = [lambda completions, **_: MIXED, lambda completions, **_: [None] * 14 + [1.0, 1.0]]
    made, batch, _ = scored(tmp_path, parts, reward_weights=[1.0, 0.25])
    assert made.generation_step.rewards.tolist() == [*MIXED[:14], 0.75, 0.5]
    assert distilled(batch) == [4, 6, 7, 13]


def test_correctness_is_a_predicate_on_rewards_and_columns(tmp_path):
    seen = []

    def correctness(rewards, columns):
        seen.append((rewards.tolist(), sorted(columns)))
        return torch.tensor([grade == "good" for grade in columns["grade"]])

    def world(rows, texts):
        assert [row["query_id"] for row in rows] == [row["query_id"] for row in ROWS]
        return {"grade": ["good" if text in "ah" else "bad" for text in texts]}

    _, batch, plan = scored(tmp_path, world=world, correctness=correctness)
    assert seen == [(MIXED, ["grade"])]
    assert distilled(batch) == [1, 2, 3, 4, 5, 6]
    assert plan.demonstrations[1] == "a" and plan.demonstrations[4] == "h"


# ------------------------------------------------------------------------------------------------------- feedback


def notes(_rows, texts):
    return {"feedback": [f"{text} is wrong" if text in "aefi" else " " for text in texts]}


def test_feedback_is_ignored_unless_asked_for(tmp_path):
    _, batch, plan = scored(tmp_path, world=notes)
    assert distilled(batch) == [4, 6, 7, 13, 15] and plan.feedback == [None] * 16


def test_feedback_serves_where_there_is_no_solution(tmp_path):
    made, batch, plan = scored(tmp_path, world=notes, include_environment_feedback=True)
    # e has a sibling to learn from, f is correct, i is in the all-wrong group, a is correct with correct siblings
    assert {i: note for i, note in enumerate(plan.feedback) if note} == {5: "f is wrong", 8: "i is wrong"}
    assert distilled(batch) == [4, 6, 7, 8, 13, 15]
    assert plan.demonstrations[8] is None
    assert made._metrics["train"]["srpo/teacher_available"] == [pytest.approx(6 / 9)]


def test_feedback_may_come_beside_a_solution(tmp_path):
    _, _, plan = scored(
        tmp_path,
        world=notes,
        include_environment_feedback=True,
        environment_feedback_only_without_solution=False,
    )
    assert [plan.feedback[i] for i in (0, 4, 5, 8)] == ["a is wrong", "e is wrong", "f is wrong", "i is wrong"]
    assert plan.demonstrations[4] == "f"


def test_a_reward_function_may_give_feedback_and_wins_over_the_world(tmp_path):
    def reward(completions, log_extra, **_):
        log_extra("feedback", [f"note {i}" for i in range(16)])
        return MIXED

    made, batch, plan = scored(tmp_path, [reward], world=notes, include_environment_feedback=True)
    assert plan.feedback[8] == "note 8" and plan.feedback[4] is None
    assert distilled(batch) == [4, 6, 7, 8, 9, 10, 11, 13, 15]
    assert list(made._logs["extra"]["feedback"]) == [f"note {i}" for i in range(16)]


# --------------------------------------------------------------------------------------------- the teacher's pass


@pytest.mark.parametrize("objective", ["srpo", "sdpo"])
def test_the_teacher_runs_on_exactly_the_distilled_rows(tmp_path, objective):
    made = trainer(
        config(tmp_path, objective=objective, per_device_train_batch_size=4, gradient_accumulation_steps=4),
        rewards=lambda completions, **_: MIXED,
        rollout_func=rollouts(),
    )
    seen, score = [], made.teacher.score

    def spy(ids, mask, length):
        seen.extend(row[kept.bool()].tolist() for row, kept in zip(ids, mask, strict=True))
        return score(ids, mask, length)

    made.teacher.score = spy
    made.model.train()
    batch = made._generate_and_score_completions([dict(row) for row in ROWS])
    rows = distilled(batch)
    assert len(rows) == {"srpo": 5, "sdpo": 11}[objective] == len(seen)
    for i, ids in zip(rows, seen, strict=True):
        question = ROWS[i]["prompt"][0]["content"]
        text = tokenizer().decode(ids)
        assert ids[-2:] == [LETTERS[i], tokenizer().eos_token_id]  # the student's own tokens
        assert text.startswith(f"<|im_start|>user\n{question}\nCorrect solution:\n\n")
        assert text.endswith(f"original question.<|im_end|>\n<|im_start|>assistant\n{'abcdefghijklmnop'[i]}<|im_end|>")


def test_no_teacher_pass_when_nothing_is_distilled(tmp_path):
    made, batch, _ = scored(tmp_path, [0.0] * 16)
    made.teacher.score = None  # would raise
    batch = made._generate_and_score_completions([dict(row) for row in ROWS])
    assert distilled(batch) == [] and batch["distillation_weights"].abs().max() == 0


@pytest.mark.parametrize("mode", ["topk_logits", "full_logits"])
def test_a_teacher_that_is_told_nothing_teaches_nothing(tmp_path, mode):
    made, batch, _ = scored(tmp_path, objective="sdpo", reprompt_template="{prompt}", distillation_mode=mode)
    assert len(distilled(batch)) == 11
    loss = made._compute_loss(made.model, batch)
    loss.backward()
    assert abs(loss.item()) <= 1e-7
    assert max(p.grad.abs().max() for p in made.model.parameters()) <= 1e-6
    told, batch, _ = scored(tmp_path, objective="sdpo", distillation_mode=mode)
    loss = told._compute_loss(told.model, batch)
    loss.backward()
    assert loss.item() > 1e-3
    assert max(p.grad.abs().max() for p in told.model.parameters()) > 1e-3
