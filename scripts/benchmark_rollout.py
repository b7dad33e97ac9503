"""Rollouts beside TRL's: sampling completions of one turn, and of several turns with an environment's text between.

    python scripts/benchmark_rollout.py                                   # the table of recipes/RESULTS.md
    python scripts/benchmark_rollout.py --model smollm2 --turns 1 3 --prompts 2 --repeats 1

The same model, prompts and numbers of tokens; both sides take turns in one process. One turn is what a GRPO step of
each trainer samples (its `_generate`). Of several turns TRL's side is what its tool loop does: every turn generates
from the whole conversation so far, which is encoded anew for every row. Its tools need a chat template that can call
them, so that its own generation is called with the contexts that its loop would build. The random model never ends a
turn before its last token: both sides write the same number of tokens, and the table counts them.

`limit` is the ratio of token positions that a model forwards: all rows anew in each turn, against each different
beginning once. Decoding takes one forward per token on both sides, which no sharing shortens: it bounds what is seen.
Seconds as in `benchmark_step.py`.
"""

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from benchmark_common import MODELS, Ids, Watch, load_tokenizer, machine, make_model, make_prompts, median, token_limit
from transformers import AutoModelForCausalLM
from trl import GRPOConfig
from trl import GRPOTrainer as TRLGRPOTrainer

from srpo import SRPOConfig, SRPOTrainer
from srpo.ranges import at_least, ranged
from srpo.types import Observation, Row, Stop

NEVER = 10**6
ANSWER = "ka to mi ren sol va per lin"


class _Episode:
    """Says the same after every turn."""

    def choices(self) -> None:
        return None

    async def step(self, text: str) -> Observation:
        return Observation(ANSWER)

    def columns(self, stop: Stop) -> Mapping[str, Any]:
        return {}


class _Environment:
    """`srpo.types.Environment`."""

    def episode(self, row: Row, seed: str) -> _Episode:
        return _Episode()

    def metrics(self) -> Mapping[str, float]:
        return {}

    def spent_usd(self) -> float:
        return 0.0

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass


def no_reward(completions: Sequence[Any], **_: Any) -> list[float]:
    return [0.0] * len(completions)


class Side:
    """One trainer that only samples."""

    def __init__(self, ours: bool, folder: str, data: Any, output: str, turns: int, args: argparse.Namespace) -> None:
        self.ours, self.turns, self.tokens = ours, turns, args.tokens
        observed = 0 if turns == 1 else 64  # room for what the environment says
        common: dict[str, Any] = {
            "output_dir": output,
            "use_cpu": args.device == "cpu",
            "bf16": args.device == "cuda",
            "num_generations": args.group,
            "per_device_train_batch_size": args.prompts * args.group,
            "max_completion_length": turns * (args.tokens + observed),
            "report_to": "none",
            "disable_tqdm": True,
        }
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        tokenizer = load_tokenizer(folder)
        kwargs: dict[str, Any] = {"processing_class": tokenizer}
        if ours:
            several = {} if turns == 1 else {"max_turns": turns, "max_turn_tokens": args.tokens}
            config: Any = SRPOConfig(**common, **several, objective="grpo", log_completions=False)
            kwargs |= {} if turns == 1 else {"environment": _Environment()}
            self.trainer: Any = SRPOTrainer(model, no_reward, config, data, **kwargs)
        else:
            config = GRPOConfig(**{**common, "max_completion_length": args.tokens})
            self.trainer = TRLGRPOTrainer(model, no_reward, config, data, **kwargs)
        self.trainer.model.train()
        self.said = tokenizer(ANSWER)["input_ids"]
        self.watch = Watch(args.device, args.clock == "wall")
        self.watch.wrap(self.trainer, "_generate", "generation", self._seen)
        self.prompts: list[Ids] = []
        self.completions: list[Ids] = []

    def _seen(self, output: Any) -> None:
        self.prompts, self.completions = ([list(ids) for ids in part] for part in output[:2])

    def sample(self, rows: list[dict[str, Any]]) -> float:
        """Seconds of one batch of rollouts, of rows that are repeated for their group."""
        if self.ours:
            self.trainer._generate_and_score_completions(rows)
            return self.watch.parts["generation"][-1]
        if self.turns == 1:
            self.trainer._generate([row["prompt"] for row in rows])
            return self.watch.parts["generation"][-1]
        start = self.watch.now()
        self.prompts = self.trainer._tokenize_prompts([row["prompt"] for row in rows])[0]
        contexts = [list(ids) for ids in self.prompts]
        for _ in range(self.turns):
            written, _logps = self.trainer._generate_single_turn(contexts, None, {}, self.trainer.num_generations)
            contexts = [[*c, *ids, *self.said] for c, ids in zip(contexts, written, strict=True)]
        ends = -len(self.said)
        self.completions = [c[len(p) : ends] for c, p in zip(contexts, self.prompts, strict=True)]
        return self.watch.now() - start


def positions(side: Side) -> float:
    """Token positions that TRL forwards, over those of each different beginning once."""
    if side.turns == 1:
        return token_limit(side.prompts, side.completions)
    step = side.tokens + len(side.said)
    plain = sum(len(p) + t * step + side.tokens for p in side.prompts for t in range(side.turns))
    shared = sum(map(len, {tuple(p) for p in side.prompts})) + sum(len(c) for c in side.completions)
    return plain / shared


def measure(model: str, turns: int, args: argparse.Namespace) -> dict[str, Any]:
    """Medians of seconds of both sides, with what they are of."""
    with tempfile.TemporaryDirectory() as folder:
        place = make_model(model, folder, NEVER)
        data = make_prompts(load_tokenizer(place), args.prompts, args.prompt_tokens, args.common_tokens)
        rows = [dict(row) for row in data for _ in range(args.group)]
        sides = {name: Side(ours, place, data, folder, turns, args) for name, ours in (("trl", False), ("srpo", True))}
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for turn in range(args.repeats + 1):  # the first one is warm-up
            for name, side in sides.items():
                found = side.sample(rows)
                seconds[name] += [found] if turn else []
                print(f"{model}, {turns} turns: {name} {found:.2f} s", flush=True)
        theirs, ours = median(seconds["trl"]), median(seconds["srpo"])
        written = {name: sum(map(len, side.completions)) // len(rows) for name, side in sides.items()}
        limit = positions(sides["trl"])
    record = {"model": model, "prompt": args.prompt_tokens, "turns": turns, "tokens": args.tokens, "group": args.group}
    return {**record, "trl": theirs, "srpo": ours, "ratio": theirs / ours, "limit": limit, "written": written}


def line(record: dict[str, Any]) -> str:
    """A row of the table."""
    shape = "{prompt} / {turns} x {tokens} / {group}".format(**record)
    seconds = [f"{record[name]:.2f}" for name in ("trl", "srpo", "ratio", "limit")]
    written = "{trl}, {srpo}".format(**record["written"])
    return "| " + " | ".join([record["model"], shape, *seconds, written]) + " |"


def main(argv: Sequence[str] | None = None) -> str:
    """Command line; returns the table that it printed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    number = ranged(at_least(1), whole=True)
    parser.add_argument("--model", nargs="+", default=["tiny", "moe"], help=f"{', '.join(MODELS)}, or folders")
    parser.add_argument("--turns", type=number, nargs="+", default=[1, 3])
    parser.add_argument("--prompts", type=number, default=4)
    parser.add_argument("--group", type=ranged(at_least(2), whole=True), default=8)
    parser.add_argument("--prompt-tokens", type=number, default=400)
    parser.add_argument("--common-tokens", type=ranged(at_least(0), whole=True), default=0)
    parser.add_argument("--tokens", type=number, help="of a turn; default: 48 of one, 16 of several")
    parser.add_argument("--repeats", type=number, default=3)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--clock", choices=("cpu", "wall"), default="cpu", help="seconds on a CPU")
    parser.add_argument("--threads", type=number, default=1, help="of torch, on a CPU")
    args = parser.parse_args(argv)
    if args.device == "cpu":
        torch.set_num_threads(args.threads)
    lines = ["| model | P / turns x tokens / G | TRL s | srpo s | x TRL | limit | tokens a row |", "|" + "---|" * 7]
    for model in args.model:
        for turns in args.turns:
            given = {"tokens": args.tokens or (48 if turns == 1 else 16)}
            lines.append(line(measure(model, turns, argparse.Namespace(**{**vars(args), **given}))))
    print("\n".join(lines))
    print(machine(args.device))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
