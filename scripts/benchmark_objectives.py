"""GRPO, SDPO and SRPO on a task where a failed answer can be told token by token what is wrong with it.

    python scripts/benchmark_objectives.py --out outputs/objectives.jsonl --picture outputs/objectives.png

The task: eight digits sorted, upwards or downwards,

    question 56679025      answers u02556679 and d97665520

so a question has two right answers, each token of one follows from those before it, and one slip spoils it. Each
training question is new, and none is held out. The policy is a language model from nothing (`srpo.scratch_lm`). Half
of its supervised start is asked as the self-teacher is: with a right answer that may go the other way than the one to
write, or, so that it learns to trust what it is shown, with any digits, to be repeated. It is one for all seeds (as
papers have one pretrained model); a seed draws the training questions and the samples. All objectives train from that
start, on the same questions.

Held-out numbers are exact, without sampling: the probability of a right answer at temperature 1 (the sum over the
two), whether the most probable tokens make one, and the entropy of a token along them. The learning rate of an
objective is the one of --rates with the highest mean of all evaluations in a run of the validation seed.
--out keeps finished runs, one JSON line each; a run that is there is not made again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Collection, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from matplotlib.figure import Figure
from transformers import PreTrainedModel
from trl import SFTConfig

from routers.evaluation.statistics import Bootstrap, Estimate
from srpo import SRPOConfig, SRPOTrainer
from srpo.garbage import set_imports_aside
from srpo.ranges import above, at_least, ranged
from srpo.scratch_lm import tiny_causal_lm, train_tokenizer
from srpo.sft import encode_turn, sft
from srpo.teacher.prompt import Templates, reprompt
from srpo.teacher.teacher import plain_copy

OBJECTIVES: Mapping[str, dict[str, Any]] = {
    "GRPO": {"objective": "grpo"},
    "SDPO": {"objective": "sdpo"},
    "SRPO": {"objective": "srpo"},
    "SRPO, no weights": {"objective": "srpo", "entropy_weight_beta": 0.0},
    "SRPO, reverse KL": {"objective": "srpo", "distillation_alpha": 1.0},
}
COMPARED = list(OBJECTIVES)[:4]
"""What runs where nothing is said."""
TUNED_AS = {name: "SRPO" for name in OBJECTIVES if name.startswith("SRPO,")}
"""A variant takes the learning rate of what it is a variant of."""
PAIRS = [("SRPO", "GRPO"), ("SRPO", "SDPO"), ("SDPO", "GRPO"), *((name, "SRPO") for name in TUNED_AS)]
COLOURS = ("#0072B2", "#E69F00", "#D55E00", "#666666", "#009E73")
TOLD = Templates(SRPOConfig.reprompt_template, SRPOConfig.solution_template, SRPOConfig.feedback_template)
DIGITS = 8
PROMPTS, GROUP = 8, 8
VALIDATION_SEED = 1000
SHAPE = ("steps", "every", "start_rows", "questions")
"""Of the command line: what a finished run must agree in."""
QUIET: dict[str, Any] = {
    "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "save_strategy": "no", "report_to": "none",
    "disable_tqdm": True,
}  # fmt: skip

Question = tuple[int, ...]
Run = Mapping[str, Any]
"""A line of --out."""


def answers(question: Question) -> list[str]:
    """The two right ones."""
    upwards = "".join(map(str, sorted(question)))
    return ["u" + upwards, "d" + upwards[::-1]]


def messages(question: Question, shown: str | None = None) -> Any:
    """The prompt; with an answer that is `shown`, the self-teacher's."""
    prompt: Any = [{"role": "user", "content": "".join(map(str, question))}]
    return prompt if shown is None else reprompt(prompt, shown, None, TOLD)


def draw(rng: np.random.Generator, count: int, without: Collection[Question] = ()) -> list[Question]:
    found: list[Question] = []
    while len(found) < count:
        some: list[Question] = [tuple(row) for row in rng.integers(0, 10, (count, DIGITS)).tolist()]
        found += [question for question in some if question not in without]
    return found[:count]


@cache
def tokenizer() -> Any:
    """One token for a digit, and one for each phrase of the self-teacher's prompt: steps are cheap."""
    phrases = [TOLD.solution.split("{")[0], TOLD.reprompt.split("}")[-1]]
    return train_tokenizer(["u", "d"], vocab_size=300, whole=phrases)


def encoded(prompt: Any, answer: str) -> dict[str, list[Any]]:
    completion = [{"role": "assistant", "content": answer}]
    return encode_turn({"prompt": prompt, "completion": completion}, tokenizer(), [tokenizer().eos_token_id])


class HeldOut:
    """Questions with their right answers; `told`: asked as the self-teacher is, shown one or the other."""

    def __init__(self, questions: Sequence[Question], told: bool = False) -> None:
        self.questions, rows = questions, []
        for i, question in enumerate(questions):
            right = answers(question)
            rows += [encoded(messages(question, right[i % 2] if told else None), answer) for answer in right]
        self.ids = torch.tensor([row["input_ids"] for row in rows])
        self.length = sum(label != -100 for label in rows[0]["labels"])

    @torch.no_grad()
    def read(self, model: PreTrainedModel) -> dict[str, np.ndarray]:
        """Of every question; `up` is the share of the first in the probability of both answers."""
        model.eval()
        logits = model(self.ids, use_cache=False).logits[:, -self.length - 1 : -1].float()
        logp, asked = logits.log_softmax(-1), self.ids[:, -self.length :]
        each = logp.gather(-1, asked[..., None]).squeeze(-1).sum(-1).exp().view(-1, 2)
        entropy = -(logp.exp() * logp).sum(-1).mean(-1).view(-1, 2).mean(-1)
        greedy = (logits.argmax(-1) == asked).all(-1).view(-1, 2).any(-1)
        found = {"right": each.sum(-1), "greedy": greedy.float(), "entropy": entropy, "up": each[:, 0] / each.sum(-1)}
        return {name: value.numpy() for name, value in found.items()}


def make_start(rows: int, heldout: Collection[Question], folder: str) -> PreTrainedModel:
    """The policy that has imitated `rows` answers."""
    rng, turns = np.random.default_rng(0), []
    for kind, question in enumerate(draw(rng, rows, heldout)):
        answer, shown = rng.choice(answers(question), 2).tolist()
        if kind % 4 == 0:
            answer = shown = answer[0] + "".join(map(str, rng.integers(0, 10, DIGITS)))
        turns.append(encoded(messages(question, shown if kind % 2 == 0 else None), answer))
    model = tiny_causal_lm(tokenizer(), hidden=64, layers=2, intermediate=128, positions=128)
    args = SFTConfig(
        folder, num_train_epochs=1, per_device_train_batch_size=64, learning_rate=3e-3, warmup_steps=20,
        lr_scheduler_type="constant_with_warmup", max_length=None, logging_strategy="no", **QUIET,
    )  # fmt: skip
    return sft(model, tokenizer(), turns, args)


def right(completions: Sequence[Any], right_ones: Sequence[Sequence[str]], **_: Any) -> list[float]:
    """The reward."""
    texts = [completion[0]["content"] for completion in completions]
    return [float(text in ones) for text, ones in zip(texts, right_ones, strict=True)]


def train(
    start: PreTrainedModel, name: str, rate: float, seed: int, args: argparse.Namespace, heldout: HeldOut
) -> dict[str, Any]:
    """One run, as it stands in --out."""
    rows = [
        {"prompt": messages(question), "right_ones": answers(question)}
        for question in draw(np.random.default_rng([seed, 1]), args.steps * PROMPTS, {*heldout.questions})
    ]
    model, curves = plain_copy(start), []

    def evaluate() -> dict[str, float]:
        curves.append(heldout.read(model))
        return {"reward": float(curves[-1]["right"].mean())}

    with tempfile.TemporaryDirectory() as folder:
        config = SRPOConfig(
            folder, **OBJECTIVES[name], num_generations=GROUP, per_device_train_batch_size=PROMPTS * GROUP,
            max_completion_length=DIGITS + 8, max_steps=args.steps, learning_rate=rate, warmup_steps=5,
            lr_scheduler_type="constant_with_warmup", weight_decay=0.01, log_completions=False, seed=seed,
            logging_steps=args.every, eval_strategy="steps", eval_steps=args.every, eval_on_start=True,
            shared_prefix="off", **QUIET,
        )  # fmt: skip
        data = Dataset.from_list(rows)
        trainer = SRPOTrainer(model, right, config, data, processing_class=tokenizer(), heldout=evaluate)
        trainer.train()
    logged = [record for record in trainer.state.log_history if "completions/mean_length" in record]
    found: dict[str, Any] = {"items": [[round(float(p), 3) for p in one["right"]] for one in curves]}
    found |= {key: [float(one[key].mean()) for one in curves] for key in ("right", "greedy", "entropy", "up")}
    found |= {key: [one.get(key) for one in logged] for key in ("completions/mean_length", "srpo/distilled_share")}
    return found


def mean(runs: Sequence[Run], key: str) -> np.ndarray:
    """Over seeds, of every evaluation."""
    return np.asarray([run[key] for run in runs], dtype=float).mean(axis=0)


def items(runs: Sequence[Run], step: int) -> np.ndarray:
    """[seeds, questions] probabilities of a right answer."""
    return np.array([run["items"][step // run["every"]] for run in runs])


def shown(value: Estimate, spec: str = ".1f") -> str:
    return f"{100 * value.value:{spec}} [{100 * value.low:{spec}}, {100 * value.high:{spec}}]"


def table(found: Mapping[str, Sequence[Run]], steps: Sequence[int]) -> list[str]:
    """Means over seeds, in per cent, with 95 % intervals over seeds and questions; then paired differences."""
    draws = Bootstrap(len(next(iter(found.values()))[0]["items"][0]))
    at = " | ".join(f"step {step}" for step in steps)
    heads = f"rate | start | {at} | best (step) | greedy | upwards | entropy | tokens | distilled"
    lines = [f"| | {heads} |", "|---" * (9 + len(steps)) + "|"]
    for name, runs in found.items():
        curve, shares = mean(runs, "right"), mean(runs, "srpo/distilled_share")
        best = int(curve.argmax())
        cells = [name, f"{runs[0]['rate']:g}", f"{100 * curve[0]:.1f}"]
        cells += [shown(draws.estimate(items(runs, step))) for step in steps]
        cells += [f"{100 * curve[best]:.1f} ({best * runs[0]['every']})"]
        cells += [f"{100 * mean(runs, key)[-1]:.1f}" for key in ("greedy", "up")]
        cells += [f"{mean(runs, 'entropy')[-1]:.3f}", f"{mean(runs, 'completions/mean_length')[-1]:.2f}"]
        cells += ["-" if np.isnan(shares).any() else f"{shares[0]:.0%} to {shares[-1]:.0%}"]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", f"| difference, points | {at} |", "|---" * (1 + len(steps)) + "|"]
    for one, other in PAIRS:
        if {one, other} <= {*found}:
            differences = (items(found[one], step) - items(found[other], step) for step in steps)
            cells = [shown(draws.estimate(difference), "+.1f") for difference in differences]
            lines.append(f"| {one} - {other} | {' | '.join(cells)} |")
    return lines


PANELS = {
    "right": "probability of a right answer, held out",
    "entropy": "entropy of a token, nats",
    "completions/mean_length": "tokens of a sampled answer",
}


def draw_picture(found: Mapping[str, Sequence[Run]], path: Path) -> None:
    """Curves over the steps, the accuracy with its interval."""
    figure = Figure(figsize=(11, 3.4), dpi=130, layout="constrained")
    panels = figure.subplots(1, 3, width_ratios=(2, 1, 1))
    for (name, runs), colour in zip(found.items(), COLOURS, strict=False):
        steps, draws = np.arange(len(runs[0]["items"])) * runs[0]["every"], Bootstrap(len(runs[0]["items"][0]))
        bands = np.array([(band.low, band.high) for band in (draws.estimate(items(runs, step)) for step in steps)])
        panels[0].fill_between(steps, *bands.T, color=colour, alpha=0.15, linewidth=0)
        for axes, key in zip(panels, PANELS, strict=True):
            curve = mean(runs, key)
            axes.plot(steps[-len(curve) :], curve, color=colour, label=name)
    for axes, title in zip(panels, PANELS.values(), strict=True):
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_xlabel("step")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False)
    figure.savefig(path)


def main(argv: Sequence[str] | None = None) -> str:
    """Command line; returns the table that it printed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    number = ranged(at_least(1), whole=True)
    parser.add_argument("--objectives", nargs="+", choices=list(OBJECTIVES), default=COMPARED)
    parser.add_argument("--steps", type=number, default=240)
    parser.add_argument("--every", type=number, default=10, help="steps between evaluations")
    parser.add_argument("--seeds", type=number, default=5, help="how many, from 0")
    parser.add_argument("--rates", type=ranged(above(0)), nargs="+", default=[1e-4, 3e-4, 1e-3], help="learning rates")
    parser.add_argument("--at", type=number, nargs="*", default=[10, 40], help="steps of the table beside the last")
    parser.add_argument("--start-rows", type=number, default=14_000, help="of the supervised start")
    parser.add_argument("--questions", type=number, default=256, help="held out")
    parser.add_argument("--out", type=Path, help="file of finished runs; default: none are kept")
    parser.add_argument("--picture", type=Path)
    args = parser.parse_args(argv)
    if odd := [step for step in (*args.at, args.steps) if step % args.every or step > args.steps]:
        parser.error(f"step {odd[0]} has no evaluation: --every {args.every}, --steps {args.steps}")
    torch.set_num_threads(1)
    questions = draw(np.random.default_rng(7), args.questions)
    done = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out and args.out.exists() else []
    plain, told = HeldOut(questions), HeldOut(questions, told=True)
    start: list[PreTrainedModel] = []  # made where a run is missing

    def run(name: str, rate: float, seed: int) -> Run:
        wanted = {"objective": name, "rate": rate, "seed": seed} | {key: vars(args)[key] for key in SHAPE}
        for one in done:
            if wanted.items() <= one.items():
                return one
        if not start:
            with tempfile.TemporaryDirectory() as folder:
                start.append(make_start(args.start_rows, {*questions}, folder))
            set_imports_aside()
        one = wanted | train(start[0], name, rate, seed, args, plain)
        one["told"] = float(told.read(start[0])["right"].mean())
        done.append(one)
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            with args.out.open("a") as file:
                file.write(json.dumps(one) + "\n")
        print(f"{name}, rate {rate:g}, seed {seed}: {one['right'][0]:.3f} -> {one['right'][-1]:.3f}", flush=True)
        return one

    tuned = dict.fromkeys(TUNED_AS.get(name, name) for name in args.objectives)
    tried = {name: [run(name, rate, VALIDATION_SEED) for rate in args.rates] for name in tuned}
    best = {name: max(runs, key=lambda one: float(np.mean(one["right"]))) for name, runs in tried.items()}
    found: dict[str, list[Run]] = {name: [] for name in args.objectives}
    for seed in range(args.seeds):
        for name, runs in found.items():
            runs.append(run(name, best[TUNED_AS.get(name, name)]["rate"], seed))
    first = found[args.objectives[0]][0]
    lines = [
        f"{args.seeds} seeds, {args.questions} held-out questions. The start is right with probability "
        f"{first['right'][0]:.1%}, told a right answer with {first['told']:.1%}. Validation, mean over a run:",
    ]
    for name, runs in tried.items():
        means = ", ".join(f"rate {one['rate']:g} {np.mean(one['right']):.1%}" for one in runs)
        lines.append(f"{name}: {means}")
    lines += ["", *table(found, [*args.at, args.steps])]
    print("\n".join(lines), flush=True)
    if args.picture:
        draw_picture(found, args.picture)
    return "\n".join(lines)


if __name__ == "__main__":
    main()
