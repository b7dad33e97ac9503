"""objective: bopo in a real trainer: GRPO in its limit, advantages by hand, decisions scored as they were sampled."""

import math
from collections.abc import Sequence
from typing import Any

import core_helpers as core
import pytest
import torch
from datasets import Dataset
from test_step_routing_episode import world

from rewards.boundary import BoundaryReward, make_boundary_reward
from routers.tasks.step_routing.budget import Budget
from srpo.trainer.trainer import SRPOTrainer
from srpo.types import CORRECT

LN2 = math.log(2)
PLAIN = {"advantage_baseline": "none", "advantage_scale": "group"}


@pytest.mark.parametrize(
    "split",
    [
        {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 1},
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "steps_per_generation": 4, "beta": 0.1},
    ],
    ids=["whole", "cut, off-policy, with a reference"],
)
def test_without_references_it_is_trl_grpo_with_group_scaling(tmp_path: Any, split: dict[str, Any]) -> None:
    """TRL's loss_type "grpo" with scale_rewards "group": the same numbers after several steps."""
    core.model().save_pretrained(tmp_path / "start")
    shared = {"max_steps": 4, "max_grad_norm": 0.5, "epsilon_high": 0.2, "model_init_kwargs": {"dtype": "float32"}}
    after = []
    for own in ({"objective": "grpo", "loss_type": "grpo", "scale_rewards": "group"}, {"objective": "bopo", **PLAIN}):
        made = core.trainer(core.config(tmp_path, **shared, **split, **own), str(tmp_path / "start"))
        made.train()
        after.append((core.weights(made.model), core.logged(made, "loss")))
    (trl, trl_losses), (ours, our_losses) = after
    assert core.distance(trl, core.weights(core.model())) > 1e-4  # something was learned
    # TRL divides a micro-batch's mean, we the sum: the same bits, but for a division by no power of two.
    assert core.distance(trl, ours) <= (0.0 if "beta" not in split else 5e-7)
    assert our_losses == pytest.approx(trl_losses, abs=1e-4)


class Watched(SRPOTrainer):
    """Keeps the last generation batch."""

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        self.batch = super()._generate_and_score_completions(inputs)
        return dict(self.batch)


def corridors(lengths: Sequence[int] = (3, 5, 8, 13), cap: float = 2.0) -> Dataset:
    """Ten steps, of which `cap` may be double."""
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": f"walk {n}"}],
                "query_id": f"c{n}",
                "length": n,
                "cap": cap,
                "p_small": float(n <= 8),
                "p_large": 1.0,
                "cost_small": 0.01 * n,
                "cost_large": 0.1 * n / 2,
                "hard": n > 8,
                "references": [0.5, 1.0 + n / 10],
            }
            for n in lengths
        ]
    )


def bopo_trainer(folder: Any, network: Any = None, data: Dataset | None = None, **changes: Any) -> Any:
    environment = world(Budget(2))
    environment.labels = {"small": "a", "large": "b"}
    environment.names = {"a": "small", "b": "large"}
    args = core.config(
        folder, **{"objective": "bopo", "max_turns": 10, "max_completion_length": 100, "temperature": 0.7, **changes}
    )
    return core.trainer(
        args,
        network,
        rewards=make_boundary_reward(BoundaryReward(0.3, 1.0)),
        cls=Watched,
        rollout_func=None,
        train_dataset=corridors() if data is None else data,
        environment=environment,
        correctness=lambda rewards, columns: rewards.new_tensor([s or 0.0 for s in columns[CORRECT]]) >= 1,
    )


def test_old_and_reference_are_scored_as_the_decision_was_sampled(tmp_path: Any) -> None:
    core.model().save_pretrained(tmp_path / "start")
    made = bopo_trainer(
        tmp_path, str(tmp_path / "start"), beta=0.1, steps_per_generation=2, per_device_train_batch_size=8,
        model_init_kwargs={"dtype": "float32"},
    )  # fmt: skip
    made.train()
    batch = made.batch
    decided = (batch["choices"] >= 0).any(-1) & batch["tool_mask"].bool() & batch["completion_mask"].bool()
    assert decided.sum() > 50 and torch.equal(decided, batch["tool_mask"].bool() & batch["completion_mask"].bool())
    sampled = batch["sampling_per_token_logps"][decided]
    assert (batch["old_per_token_logps"][decided] - sampled).abs().max() < 1e-5
    assert (batch["ref_per_token_logps"][decided] - sampled).abs().max() < 1e-5  # it is the start, at step one
    # After two expensive calls one label is left: the decision is certain.
    alone = decided & ((batch["choices"] >= 0).sum(-1) == 1)
    assert alone.any() and batch["old_per_token_logps"][alone].abs().max() == 0.0
    assert sampled.exp().max() <= 1.0 and sampled.min() > -10  # over two labels, not over the vocabulary
    assert core.logged(made, "budget/violations") == [0.0]


def test_without_references_it_is_trl_grpo_on_masked_decisions_too(tmp_path: Any) -> None:
    """TRL's own loss reads the same renormalised probabilities: new, old and the reference's."""
    core.model().save_pretrained(tmp_path / "start")
    shared = {
        "max_steps": 4, "beta": 0.1, "steps_per_generation": 2, "per_device_train_batch_size": 8, "epsilon_high": 0.2,
        "model_init_kwargs": {"dtype": "float32"}, "data": corridors([14, 15, 16, 17], cap=6.0),
    }  # fmt: skip
    after = []
    for own in ({"objective": "grpo", "loss_type": "grpo", "scale_rewards": "group"}, PLAIN):
        made = bopo_trainer(tmp_path, str(tmp_path / "start"), **shared, **own)
        made.train()
        after.append(core.weights(made.model))
    assert core.distance(after[0], core.weights(core.model())) > 1e-4
    assert core.distance(*after) <= 5e-7


def test_advantages_are_reference_guided(tmp_path: Any) -> None:
    made = bopo_trainer(tmp_path, advantage_baseline="refmax", advantage_scale="none")
    made.train()
    rewards, got = made.generation_step.rewards.view(-1, 4), made.batch["advantages"].view(-1, 4)
    found = torch.tensor(made.generation_step.references).view(-1, 4, 2)[:, 0]
    assert found[:, 1].unique().numel() == 4  # four different tasks
    best = torch.maximum(rewards.mean(1), found.max(dim=1).values)
    assert torch.allclose(got, rewards - best[:, None], atol=1e-6) and (got < 0).any()
    assert list(made._logs["advantages"]) == pytest.approx(made.batch["advantages"].tolist())
    assert core.logged(made, "bopo/below_baseline") == [pytest.approx((got < 0).float().mean().item())]
    assert made.teacher is None and not made.batch["distilled"].any()


def test_dropping_groups_without_success(tmp_path: Any) -> None:
    data = corridors([15, 21, 15, 21], cap=10.0)  # 21 is out of reach
    made = bopo_trainer(tmp_path, data=data, **PLAIN, drop_all_fail=True)
    made.train()
    success = torch.tensor([s >= 1 for s in made.generation_step.columns[CORRECT]]).view(-1, 4).any(1)
    got, rewards = made.batch["advantages"].view(-1, 4), made.generation_step.rewards.view(-1, 4)
    assert (~success).sum() == 2 and rewards[~success].std(dim=1).min() > 0.01, "they fail at different costs"
    assert got[~success].abs().max() == 0.0 and got[success].abs().max() > 0.5


def distilling(folder: Any, **changes: Any) -> Any:
    """Who takes less than five or six double steps of ten fails, and has a sibling who did not; six are allowed."""
    made = bopo_trainer(
        folder, data=corridors([15, 16, 15, 16], cap=6.0), distill_failed=True, learning_rate=0.0, num_generations=8,
        per_device_train_batch_size=32, teacher_model_kind="frozen", **changes,
    )  # fmt: skip
    made.contexts, forward = {}, made.distiller.score

    def spy(prompts: Any, rows: Any, batch: Any) -> Any:
        made.contexts |= dict(zip(rows, prompts, strict=True))
        return forward(prompts, rows, batch)

    made.distiller.score = spy
    made.train()
    return made


def test_failed_episodes_with_a_successful_sibling_are_distilled_where_asked(tmp_path: Any) -> None:
    made = distilling(tmp_path)
    success = torch.tensor([s >= 1 for s in made.generation_step.columns[CORRECT]])
    mixed = success.view(-1, 8).any(1).repeat_interleave(8) & ~success
    assert mixed.any() and success.any() and torch.equal(made.batch["distilled"], mixed)


@pytest.mark.parametrize("room", [85, 1000])
def test_the_teacher_reads_the_siblings_decisions_and_observations(tmp_path: Any, room: int) -> None:
    made = distilling(tmp_path, max_reprompt_len=room)
    success, members = [s >= 1 for s in made.generation_step.columns[CORRECT]], made.generation_step.columns["members"]
    assert sorted(made.contexts) == made.batch["distilled"].nonzero().flatten().tolist()
    for row, context in made.contexts.items():
        sibling = next(i for i in range(row - row % 8, row + 8) if success[i])
        whole = "".join(f"{'ab'[name == 'large']}<{n}>" for n, name in enumerate(members[sibling], 1))
        whole = whole[: whole.rindex("<")]  # after the last decision nothing is said
        text = made._tokenizer.decode(context)
        shown = text.split("Correct solution:\n\n")[1].split("\n\nCorrectly solve")[0]
        assert len(context) <= room and f"walk {(15, 16)[row // 8 % 2]}" in text
        assert shown == whole if room > 100 else shown and whole.endswith(shown) and len(shown) < len(whole)


def kl(p: torch.Tensor, q: torch.Tensor) -> float:
    return (p.exp() * (p - q)).sum().item()


@pytest.mark.parametrize(
    ("how", "by_hand"),
    [
        ({}, lambda s, q, at: (kl(s, torch.logaddexp(s, q) - LN2) + kl(q, torch.logaddexp(s, q) - LN2)) / 2),
        ({"distillation_alpha": 1.0, "distillation_topk": 1}, lambda s, q, at: kl(s, q)),
        (
            {"distillation_alpha": 1.0, "distillation_mode": "sampled_token"},
            lambda s, q, at: ((s[at] - q[at]) * s[at]).item(),
        ),
    ],
    ids=["jensen-shannon", "reverse, top-k 1", "sampled token"],
)
def test_distilled_decisions_are_compared_among_their_choices(
    tmp_path: Any, how: dict[str, Any], by_hand: Any
) -> None:
    """From plain logits of both models, renormalised over the choices; and the weights, from the teacher's entropy."""
    made = distilling(tmp_path, **how)
    batch = made.batch
    mask = batch["completion_mask"] * batch["tool_mask"]
    student, teacher = made.model.eval(), made.teacher.model
    with made._among(student, batch["choices"], batch["tool_mask"]):
        got = made.loss.forward(student, batch, mask)[2]
    raw, seen = torch.zeros_like(got), 0
    for row, context in made.contexts.items():
        ids, prompt = batch["completion_ids"][row], batch["prompt_ids"][row][batch["prompt_mask"][row].bool()]
        for t in mask[row].nonzero().flatten().tolist():
            allowed = batch["choices"][row, t]
            allowed = allowed[allowed >= 0]
            with torch.no_grad():
                s, q = (
                    torch.log_softmax(network(torch.cat([start, ids[:t]])[None]).logits[0, -1, allowed] / 0.7, -1)
                    for network, start in ((student, prompt), (teacher, torch.tensor(context)))
                )
            expected = by_hand(s, q, (allowed == ids[t]).int().argmax())
            assert got[row, t].item() == pytest.approx(expected, abs=2e-5)
            seen += abs(expected) > 1e-3
            raw[row, t] = torch.exp((q.exp() * q).sum())  # exp(-H)
    assert seen > 20
    distilled = mask.bool() & batch["distilled"][:, None]
    assert torch.allclose(batch["distillation_weights"], raw / raw[distilled].mean(), atol=1e-4)
    assert (got[~distilled] == 0).all()


def test_evaluation_has_no_references_and_no_teacher(tmp_path: Any) -> None:
    made = bopo_trainer(tmp_path)
    plain = corridors().remove_columns("references")
    numbers = made.evaluate(plain)
    assert math.isfinite(numbers["eval_reward"])
    made.model.eval()
    assert "distilled" not in made._generate_and_score_completions([plain[0]] * 4)


def test_rows_without_references_are_named(tmp_path: Any) -> None:
    made = bopo_trainer(tmp_path, data=corridors().remove_columns("references"))
    with pytest.raises(ValueError, match="row 0 of the batch: column 'references' is None"):
        made.train()
    one = [{**row, "references": row["references"] if row["length"] != 8 else [0.5]} for row in corridors()]
    made = bopo_trainer(tmp_path, data=Dataset.from_list(one))
    with pytest.raises(ValueError, match=r"row \d+ of the batch: column 'references' is \[0\.5\]"):
        made.train()
