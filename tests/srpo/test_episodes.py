"""Environments in the trainer: whose tokens learn, what a lost rollout costs, what stops a run, what is logged."""

import json
from types import SimpleNamespace

import pytest
import torch
from core_helpers import config, equal, logged, tokenizer, trainer, weights
from episode_worlds import ScriptedEnvironment
from peft import LoraConfig
from trl.trainer import utils

from srpo.prefix.tree import _FIXED
from srpo.rollout.batch import kept_rows, most_choices, padded_choices, row_seeds
from srpo.teacher.lm_head import capture_hidden
from srpo.teacher.masked_decisions import scored_among
from srpo.trainer.limits import LostRollouts
from srpo.trainer.parts import base_of
from srpo.types import Observation

FRAME = {"before": "<|im_end|>\n<|im_start|>user\n", "after": "<|im_end|>\n<|im_start|>assistant\n"}
DONE = Observation(end="done")


class Graded(ScriptedEnvironment):
    """Episode n answers once, ends at its second turn, and has the n-th outcome (cyclic): a reward, or an error."""

    def __init__(self, outcomes, labels=lambda t: ["a", "b", "c"] if t == 0 else None, member="slow"):
        super().__init__(self.answer, labels)
        self.outcomes, self.member = outcomes, member
        self.outcome = {}

    def answer(self, row, t, text):
        return Observation(f"{text} <|im_end|>" * (len(text) % 3), **FRAME) if t == 0 else DONE

    def episode(self, row, seed):
        made = super().episode(row, seed)
        outcome = self.outcomes[(len(self.made) - 1) % len(self.outcomes)]
        step, columns = made.step, made.columns

        async def judged(text):
            if isinstance(outcome, Exception) and made.texts:
                raise outcome
            return await step(text)

        made.step = judged
        made.columns = lambda stop: {
            **columns(stop),
            "quality": None if isinstance(outcome, Exception) else outcome,
            "route": self.member,
            "calls": len(made.texts),
        }
        return made


def quality_reward(quality, **_):
    return list(quality)


def made_trainer(folder, environment, rewards=quality_reward, **changes):
    settings = {"max_completion_length": 60, "max_turn_tokens": 8, "objective": "grpo", **changes}
    return trainer(config(folder, **settings), rewards=rewards, rollout_func=None, environment=environment)


def scored(made):
    """A generation batch, as `_prepare_inputs` gets it; 4 groups of 4."""
    made.model.train()
    rows = [row for row in made.train_dataset.select(range(4)) for _ in range(4)]
    return made._generate_and_score_completions(rows)


# ------------------------------------------------------------------------------------------------------- whose tokens


@pytest.mark.parametrize("objective", ["grpo", "sdpo", "srpo"])
def test_gradient_on_the_worlds_tokens_is_exactly_zero(tmp_path, objective):
    made = made_trainer(tmp_path, Graded([1.0, 0.0, 0.5, 0.0]), objective=objective, beta=0.0)
    batch = scored(made)
    made.current_gradient_accumulation_steps = 1
    mask, attention = batch["tool_mask"].bool(), batch["completion_mask"].bool()
    world = ~mask & attention
    assert world.sum() > 50 and mask.sum() > 50
    gradients = []
    base = made.accelerator.unwrap_model(made.model)
    with capture_hidden(base) as hidden:
        hook = lambda _m, _a, out: out.last_hidden_state.register_hook(gradients.append) and None  # noqa: E731
        forward = base.model.register_forward_hook(hook)
        loss = made._compute_loss(made.model, batch)
        loss.backward()
        forward.remove()
    assert hidden[0].shape == gradients[0].shape
    norms = gradients[0].abs().sum(-1)[:, -1 - mask.size(1) : -1]  # position t predicts token t + 1
    assert (norms[world] == 0).all()
    moved = (norms > 0) & mask
    assert moved.sum() > 0.5 * mask.sum()


@pytest.mark.parametrize("objective", ["grpo", "srpo"])
def test_only_tokens_that_are_trained_on_reach_the_head(tmp_path, monkeypatch, objective):
    """In the passes of the old policy, the reference and the loss; numbers and gradients are the plain ones."""
    rows, theirs = [], utils._ChunkedLogProbFunction.apply
    counting = SimpleNamespace(apply=lambda hidden, *rest: (rows.append(len(hidden)), theirs(hidden, *rest))[1])
    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", counting)
    monkeypatch.setitem(_FIXED, "cpu", 0.0)  # nothing is too small to be saved
    found = []
    for mode in ("off", "auto"):
        world = Graded([1.0, 0.0, 0.5, RuntimeError("x")])
        changes = {"objective": objective, "beta": 0.1, "num_iterations": 2, "success_reward_threshold": 0.4}
        made = made_trainer(tmp_path, world, **changes, shared_prefix=mode)
        if mode == "off":
            made._among = lambda network, choices, _, made=made: scored_among(base_of(made, network), choices)
        batch = scored(made)
        made.current_gradient_accumulation_steps = 1
        loss = made._compute_loss(made.model, batch)
        loss.backward()
        mask = (batch["completion_mask"] * batch["tool_mask"]).bool()
        scores = [batch[f"{name}_per_token_logps"][mask] for name in ("old", "ref")]
        found.append([loss, *scores, *(p.grad / p.grad.norm() for p in made.model.parameters())])
    assert rows[3:] == [mask.sum()] * 3 and (~mask & batch["completion_mask"].bool()).sum() > 50
    assert rows[:3] == [batch["prompt_ids"].numel() + mask.numel() - len(mask)] * 3, "TRL's on a CPU: all of them"
    for plain, picked in zip(*found, strict=True):
        torch.testing.assert_close(picked, plain, rtol=1e-5, atol=1e-6)


def test_sampled_ids_are_trained_ids_and_their_log_probs_agree(tmp_path):
    """What the generator says of each token it drew is what the trainer's own forward says (fp32)."""
    made = made_trainer(tmp_path, Graded([1.0, 0.0], labels=lambda _: None), num_iterations=2)
    batch = scored(made)
    mask = (batch["completion_mask"] * batch["tool_mask"]).bool()
    difference = (batch["old_per_token_logps"] - batch["sampling_per_token_logps"])[mask]
    assert mask.sum() > 100 and difference.abs().max() <= 1e-5
    assert (batch["sampling_per_token_logps"][~mask] == 0).all()


def test_a_lora_policy_with_a_reference(tmp_path):
    """The adapter samples, and old and reference log-probs are scored on the same trajectory."""
    args = config(tmp_path, objective="grpo", max_completion_length=60, beta=0.1, num_iterations=2, max_turn_tokens=8)
    peft = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    made = trainer(args, rewards=quality_reward, rollout_func=None, environment=Graded([1.0, 0.0]), peft_config=peft)
    batch = scored(made)
    mask = (batch["completion_mask"] * batch["tool_mask"]).bool()
    assert (batch["old_per_token_logps"] - batch["sampling_per_token_logps"])[mask].abs().max() <= 1e-5
    assert (batch["ref_per_token_logps"] - batch["old_per_token_logps"])[mask].abs().max() > 1e-2


def test_choices_lie_at_their_tokens(tmp_path):
    batch = scored(made_trainer(tmp_path, Graded([1.0, 0.0])))
    choices, ids = batch["choices"], batch["completion_ids"]
    assert choices.shape == (*ids.shape, 3) and choices.dtype == torch.int64
    decided = (choices >= 0).any(-1)
    assert decided.sum() == 16 and decided[:, 0].all(), "the first turn of each of the 16 rows"
    allowed = tokenizer().convert_tokens_to_ids(["a", "b", "c"])
    assert choices[:, 0].tolist() == [allowed] * 16
    assert all(int(i) in allowed for i in ids[:, 0])
    assert (batch["sampling_per_token_logps"][:, 0] > -10).all()


def test_padded_choices_by_hand():
    rows = [[(), (7, 8)], [(9,)]]
    assert most_choices(rows) == 2 and most_choices([[(), ()]]) == 0
    assert padded_choices(rows, 3, 2).tolist() == [
        [[-1, -1], [7, 8], [-1, -1]],
        [[9, -1], [-1, -1], [-1, -1]],
    ]
    assert padded_choices([[(), ()]], 2, 0) is None
    # Another rank had decisions: this one, where nothing was decided, scores among choices all the same.
    assert padded_choices([[()]], 2, 1).tolist() == [[[-1], [-1]]]


# ------------------------------------------------------------------------------------------------------------- failure


def test_kept_rows_by_hand():
    # Groups of 4: none lost; one lost (3/4 survive); two lost (2/4: dropped); all lost.
    kept = kept_rows([x == "x" for x in ".... .x.. x..x xxxx".replace(" ", "")], 4)
    assert kept == [True] * 4 + [True, False, True, True] + [False] * 8
    assert kept_rows([False, True], 1) == [True, False]


def test_a_lost_rollout_leaves_its_group(tmp_path):
    """Advantages by hand, without scaling: survivors have the true mean of survivors."""
    gone = RuntimeError("member slow: 503")
    # Group 0: 1, 0, lost, 0 -> mean 1/3. Group 1: 1, lost, lost, 0 -> dropped. Group 2: 1 0 1 0. Group 3: all lost.
    outcomes = [1.0, 0.0, gone, 0.0] + [1.0, gone, gone, 0.0] + [1.0, 0.0, 1.0, 0.0] + [gone] * 4
    seen = []

    def spied(completions, quality, log_extra, **_):
        seen.append((len(completions), quality))
        log_extra("note", [f"q{q}" for q in quality])
        return list(quality)

    made = made_trainer(tmp_path, Graded(outcomes), rewards=spied)
    batch = scored(made)
    third = 1 / 3
    expected = [2 * third, -third, 0, -third] + [0.5, 0, 0, -0.5] + [0.5, -0.5, 0.5, -0.5] + [0] * 4
    assert batch["advantages"].tolist() == pytest.approx(expected, abs=1e-6)
    trained = (batch["tool_mask"] * batch["completion_mask"]).sum(dim=1) > 0
    assert trained.tolist() == [True, True, False, True] + [False] * 4 + [True] * 4 + [False] * 4
    assert seen == [(9, [1.0, 0.0, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0])], "no reward function sees a lost rollout"
    assert batch["num_items_in_batch"] == (batch["tool_mask"] * batch["completion_mask"]).sum()
    notes = list(made._logs["extra"]["note"])
    assert notes[:4] == ["q1.0", "q0.0", None, "q0.0"]
    assert made._metrics["train"]["rollout/stop/lost"] == [7 / 16]
    assert made._metrics["train"]["rollout/dropped_share"] == [9 / 16]
    assert made._metrics["train"]["reward"] == pytest.approx([4 / 9])


def test_a_batch_that_is_lost_whole_changes_nothing(tmp_path):
    made = made_trainer(tmp_path, Graded([RuntimeError("down")]), max_steps=1)
    before = weights(made.model)
    made.train()
    assert logged(made, "loss") == [0.0] and equal(before, weights(made.model))


@pytest.mark.parametrize("objective", ["sdpo", "srpo"])
def test_distilling_objectives_take_losses_too(tmp_path, objective):
    outcomes = [1.0, 0.0, RuntimeError("x"), 0.0]
    made = made_trainer(tmp_path, Graded(outcomes), objective=objective, max_steps=2)
    made.train()
    assert all(x > 0 for x in logged(made, "srpo/distilled_share"))
    assert all(torch.isfinite(p).all() for p in made.model.parameters())


def test_too_many_losses_stop_the_run_with_a_checkpoint_and_a_name(tmp_path):
    environment = Graded([RuntimeError("503 overloaded"), 1.0], member="llama-70b")
    made = made_trainer(tmp_path, environment, max_steps=9, max_lost_batches=2)
    with pytest.raises(LostRollouts, match=r"2 batches in a row.*8 x llama-70b: RuntimeError: 503 overloaded"):
        made.train()
    assert made.state.global_step == 2
    assert (tmp_path / "checkpoint-2" / "environment_0.json").exists()


def test_a_few_losses_do_not(tmp_path):
    made = made_trainer(tmp_path, Graded([1.0, 0.0, 0.0, RuntimeError("x")]), max_steps=3, max_lost_batches=1)
    made.train()  # 25 % is the share that is allowed
    assert made.state.global_step == 3


def test_the_cost_ceiling_stops_the_run_with_a_checkpoint(tmp_path):
    # 16 episodes of 2 steps at a cent each: $0.32 a batch; the third passes 70 cents with its first steps.
    made = made_trainer(tmp_path, Graded([1.0, 0.0]), max_steps=9, max_cost_usd=0.7)
    made.train()
    assert made.state.global_step == 3
    assert logged(made, "cost/spent_usd") == pytest.approx([0.32, 0.64, 0.80])
    state = json.loads((tmp_path / "checkpoint-3" / "environment_0.json").read_text())
    assert state == {"environment": {"cents": 80}, "lost_batches": 0}


def test_within_a_batch_only_what_is_under_way_is_overspent(tmp_path):
    # The ceiling falls into the first round of the second batch (32 + 16 cents): its second turns are not played.
    made = made_trainer(tmp_path, Graded([1.0, 0.0]), max_steps=9, max_cost_usd=0.4)
    made.train()
    assert made.state.global_step == 2
    assert logged(made, "cost/spent_usd") == pytest.approx([0.32, 0.48])
    assert logged(made, "rollout/stop/budget") == [0.0, 1.0]


# -------------------------------------------------------------------------------------------------- limits and records


def test_mask_truncated_completions_goes_by_the_stop_reason(tmp_path):
    """With an environment the last token is no sign: a turn that ended in a tag has no end token."""

    class Endless(Graded):
        def answer(self, row, t, text):
            return Observation("go on") if len(self.made) and row["query_id"] == "q0" else DONE

    environment = Endless([1.0, 0.0], labels=lambda _: None)
    made = made_trainer(tmp_path, environment, mask_truncated_completions=True, max_turns=2)
    batch = scored(made)
    trained = (batch["tool_mask"] * batch["completion_mask"]).sum(dim=1) > 0
    assert trained.tolist() == [False] * 4 + [True] * 12
    assert made._metrics["train"]["rollout/stop/turns"] == [0.25]
    assert made._metrics["train"]["completions/clipped_ratio"] == [0.25]


def test_what_is_logged(tmp_path):
    environment = Graded([1.0, 0.0, 1.0, 1.0])
    made = made_trainer(tmp_path, environment, max_steps=2)
    made.train()
    first = made.state.log_history[0]
    assert first["rollout/stop/done"] == 1.0 and first["rollout/stop/lost"] == 0.0
    assert first["rollout/turns"] == 2.0 and first["world/episodes"] == 16.0
    assert first["cost/per_query_usd"] == pytest.approx(0.02) and first["route/share/slow"] == 1.0
    assert first["completions/max_length"] <= 9  # a choice and a turn of 8: the policy's own tokens
    import pandas

    table = pandas.read_parquet(tmp_path / "completions" / "completions_00001.parquet")
    assert set(table["stop"]) == {"done"} and set(table["calls"]) == {2} and set(table["turns"]) == {2}
    roles = [message["role"] for message in table["completion"][0]]
    assert roles == ["assistant", "tool", "assistant"]


def test_reward_functions_get_messages_with_owners(tmp_path):
    seen = []

    def spied(completions, stop, turns, **_):
        seen.extend(completions)
        assert stop == ["done"] * 16 and turns == [2] * 16
        return [0.0] * len(completions)

    scored(made_trainer(tmp_path, Graded([1.0]), rewards=spied))
    for messages in seen:
        assert messages[0]["role"] == "assistant" and messages[0]["content"] in ("a", "b", "c")
        assert messages[-1]["role"] == "assistant"


def test_a_demonstration_is_the_transcript_of_a_sibling_that_was_not_cut(tmp_path):
    class Cut(Graded):
        """The first of each group is good but cut by the turn limit; the second is good and done."""

        def answer(self, row, t, text):
            return Observation("the world says so", **FRAME)

        def episode(self, row, seed):
            n = len(self.made) % 4
            made = super().episode(row, seed)
            step = made.step

            async def stepping(text):
                found = await step(text)
                return found if n == 0 or len(made.texts) < 2 else DONE

            made.step = stepping
            return made

    made = made_trainer(tmp_path, Cut([1.0, 1.0, 0.0, 0.0]), objective="sdpo", max_turns=2)
    plans, plan = [], made.distiller.plan
    made.distiller.plan = lambda *given: plans.append(plan(*given)) or plans[-1]
    scored(made)
    shown = plans[0].demonstrations
    assert all("the world says so" in text for text in shown if text)
    assert [text is not None for text in shown] == [True, False, True, True] * 4, "0, 2 and 3 are shown number 1"


def test_evaluation_plays_episodes_too(tmp_path):
    made = made_trainer(tmp_path, Graded([1.0, RuntimeError("x")]), max_completion_length=90)
    found = made.evaluate(made.train_dataset.select(range(4)))
    assert found["eval_rollout/stop/lost"] == 0.5 and found["eval_reward"] == 1.0
    assert not made.rollouts.losses.streak, "losses of an evaluation do not stop a run"


def test_seeds_are_names():
    assert row_seeds(["a", "b", "a"], "7:3") == ["7:3:a:0", "7:3:b:0", "7:3:a:1"]


def test_the_same_row_is_sampled_alike_in_another_batch(tmp_path):
    """Other rows around it, in another order: the completion of (row, sample) is the same."""
    found = []
    for order in ([0, 1, 2, 3], [3, 1, 5, 0]):
        made = made_trainer(tmp_path, Graded([1.0], labels=lambda _: None))
        made.model.train()
        rows = [made.train_dataset[i] for i in order for _ in range(4)]
        batch = made._generate_and_score_completions(rows)
        ids = [i[m.bool()].tolist() for i, m in zip(batch["completion_ids"], batch["completion_mask"], strict=True)]
        found.append({i: ids[4 * n : 4 * n + 4] for n, i in enumerate(order)})
    for row in (0, 1, 3):
        assert found[0][row] == found[1][row]
        assert len({tuple(ids) for ids in found[0][row]}) == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"world": lambda rows, texts: {}}, "world="),
        ({"rollout_func": lambda prompts, trainer: {}}, "rollout_func="),
        ({"config": {"generation_kwargs": {"cache_implementation": "dynamic"}}}, "generation_kwargs"),
        ({"config": {"use_transformers_continuous_batching": True}}, "continuous_batching"),
    ],
)
def test_contradictions_are_refused(tmp_path, changes, message):
    changes = dict(changes)
    args = config(tmp_path, objective="grpo", **changes.pop("config", {}))
    with pytest.raises(ValueError, match=message):
        trainer(args, **{"rollout_func": None, "environment": Graded([1.0]), **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"max_turns": 0}, "max_turns=0"), ({"stop_strings": [""]}, "stop_strings"), ({"max_lost_share": 2}, "max_lost")],
)
def test_settings_are_checked(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **changes)
