"""Think/route as a task of the one run: an agent that thinks, asks members, reads their replies, and answers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rewards.cost import warn_of_group_scale
from routers.data.folds import parted
from routers.data.table import spread
from routers.evaluation.episodes import Episodes
from routers.language.prompts import family_phrase, price, weighed
from routers.tasks.think_route.arguments import ThinkRouteArguments
from srpo.run.derived import source
from srpo.run.steps import check_rows_of_a_batch
from srpo.task import Corpus, Ids, Planned, RunArguments, Share
from srpo.types import Row

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

    from routers.tasks.think_route.environment import ThinkRoute as World
    from srpo.config import SRPOConfig


class ThinkRoute:
    """`srpo.task.Task` for agents that ask a pool, recorded or live."""

    Arguments = ThinkRouteArguments
    episodes = Episodes
    correctness = None

    def __init__(self, arguments: ThinkRouteArguments, run: RunArguments, config: SRPOConfig):
        self.arguments, self.run, self.config = arguments, run, config
        if run.sft_epochs and arguments.table is None:
            raise ValueError("the supervised start is made from the replies of a table: set sft_epochs: 0")
        if run.sft_epochs != int(run.sft_epochs):
            raise ValueError(f"sft_epochs is {run.sft_epochs}: give a whole number, members are drawn anew each time")
        self.sft_options: Mapping[str, Any] = {
            "num_train_epochs": 1,  # `sft_rows` holds all passes
            "adam_beta2": 0.95,  # some hundred steps are too few for a memory of a thousand
            # Drills are a quarter as long as episodes: rows stand behind one another instead of being padded.
            "padding_free": arguments.sft_drills > 0,
        }

    def load(self, notes: Path) -> None:
        from routers.tasks.think_route import world

        task, args = self.arguments, self.config
        self.table = world.load_replies(task, self.run, notes)
        train, self.heldout = world.load_questions(task, self.run, self.table, notes)
        learned, aside = parted([row["query"] for row in train], args.eval_strategy != "no")
        self.aside, train = [train[i] for i in aside], [train[i] for i in learned]
        self.validation = [row["query_id"] for row in self.aside]
        check_rows_of_a_batch(len(train), args, "the training questions")
        self.pool = world.make_pool(task, self.run, self.table, args.max_cost_usd)
        self.names = world.seen_members(task, self.pool)
        members = [self.pool.members[name] for name in self.names]
        self.settings = world.make_settings(task, args, members, self.table)
        self.settings.check_policy(self.run.start_from or self.run.model_name_or_path)
        if args.resume_from_checkpoint:
            self.settings.check_policy(str(args.resume_from_checkpoint))
        self._rewards = world.make_rewards(task, self.settings.members)
        self.train = [weighed(row, self.settings.cost_weights) for row in train]
        args.stop_strings = [] if task.action_format == "json" else list(self.settings.grammar.stops)

    def corpus(self) -> Corpus:
        """Prompts, turns and replies of the training questions, and the templates of the self-teacher."""
        from routers.pool.reasoning import split_reasoning
        from routers.tasks.think_route.world import prompt_of
        from srpo.scratch_lm import train_tokenizer

        if self.table is None:
            raise ValueError("a policy made from nothing needs a table, whose texts its tokenizer is trained on")
        members, args = self.settings.members, self.config
        plain = train_tokenizer([], vocab_size=259) if self.settings.action_format == "json" else None
        actions = self.settings.actions(members, plain)
        prompts = [prompt_of(row, actions) for row in self.train]
        if plain:
            texts = [plain.decode(actions.ids(prompt), skip_special_tokens=True) for prompt in prompts]
            texts += [actions.route("", member.name, "a question") for member in members]
        else:
            texts = [prompt[0]["content"] for prompt in prompts]
        for row in self.train:
            for member in members:
                answer, reasoning = split_reasoning(self.table.lookup(row["query_id"], member.name).reply)
                seen = actions.reply(answer, reasoning)
                texts += [family_phrase(row), member.name, seen.before, seen.body, seen.after]
                texts += [seen.between, seen.aside] if reasoning else []
        texts += [args.reprompt_template, args.solution_template, args.feedback_template]
        # What an agent repeats should be short: every number below 1,000 is one token, and so is many a name.
        texts += [form.format(n) for n in range(1000) for form in ("{}", "{:02}", "{:03}")]
        whole = [*actions.tags, *sorted({price(member) for member in members if member.priced})]
        return Corpus(texts, whole, vocab_size=2200, digits=3)

    def plan(self) -> Planned:
        recorded, turns = self.arguments.pool == "recorded", self.config.max_turns
        kind = "recorded: no calls" if recorded else "live"
        usd = None if self.table is None else self.table.cost_matrix("train")
        return Planned(
            len(self.train),
            [f"{len(self.names)} members, {kind}", f"{len(self.heldout)} held-out questions"],
            calls=0 if recorded else turns,
            usd_expected=None if usd is None else float(usd.mean()),
            expected_if="a call an episode, of a member by chance, as the table has them",
            usd_most=None if usd is None else turns * float(usd.max()),
            paid=not recorded,
        )

    def rows(self, tokenizer: PreTrainedTokenizerBase) -> list[Row]:
        from routers.tasks.think_route.world import prompt_of

        actions = self.settings.actions(self.settings.members, tokenizer)
        self.tools = actions.tools
        return [{"prompt": prompt_of(row, actions), **row} for row in self.train]

    def made_from(self) -> tuple[dict[str, Any], dict[str, Any]]:
        task = self.arguments
        of_start = "members unseen_members replies prompt action_format forward_empty cost_weights sft_drills"
        of_evaluation = """question_seed pool agent_prompt failed_call metric reward cost_weight format_weight
            cost_scale_usd"""
        start: dict[str, Any] = {"table": source(task.table), "catalogue": source(task.catalogue)}
        start |= {name: getattr(task, name) for name in of_start.split()}
        start["max_observation_tokens"] = self.config.max_observation_tokens
        return start, {name: getattr(task, name) for name in of_evaluation.split()}

    def prepare(self, output: Path, rows: list[Row]) -> list[Row]:
        return rows

    def sft_rows(self, tokenizer: PreTrainedTokenizerBase, ends: Sequence[int]) -> list[Ids]:
        """Episodes as ids, as the rollout would have made them, with labels on the policy's tokens only."""
        from routers.pool.reasoning import split_reasoning
        from routers.tasks.think_route.sft_rows import copy_drills, demonstrations, encode, restricted
        from routers.tasks.think_route.world import prompt_of

        assert self.table is not None  # __init__ has seen to it
        rng, actions = np.random.default_rng(self.config.seed), self.settings.actions(self.settings.members, tokenizer)
        queries = [self.train[i] for i in spread(len(self.train), self.run.sft_limit)]
        shown = restricted(self.table, self.names)
        epochs = int(self.run.sft_epochs)
        episodes = demonstrations(queries * epochs, shown, lambda query: prompt_of(query, actions), actions, rng)
        recorded = [shown.lookup(query["query_id"], name).reply for query in queries for name in self.names]
        replies = [split_reasoning(reply)[0] for reply in recorded]
        words = [tokenizer.decode([i]) for i in range(len(tokenizer)) if i not in tokenizer.added_tokens_decoder]
        whole = [word for word in words if "\ufffd" not in word]  # a token may be a part of a character
        drills = copy_drills(replies, whole, actions, rng, self.arguments.sft_drills)
        shown_tokens = self.settings.observation_tokens
        return [encode(one, tokenizer, actions, shown_tokens) for one in (*episodes, *drills)]

    def save(self, folder: Path) -> None:
        self.settings.save(folder, self.made_from()[0])

    def world(self) -> None:
        return None

    def environment(self, tokenizer: PreTrainedTokenizerBase) -> World:
        return self._world(tokenizer, self.pool, self.names)

    def _world(self, tokenizer: Any, pool: Any, names: Sequence[str]) -> World:
        from routers.tasks.think_route.world import make_world

        priced = self.run.policy_price_in > 0 or self.run.policy_price_out > 0
        return make_world(self.arguments, self.settings, pool, names, tokenizer, priced)

    def allowed_tokens(self, tokenizer: PreTrainedTokenizerBase) -> None:
        return None

    def rewards(self) -> tuple[list[Any], list[float]]:
        return self._rewards

    def callbacks(self) -> list[TrainerCallback]:
        args = self.arguments
        warn_of_group_scale(self.config.scale_rewards, max(args.cost_weights or [args.cost_weight]))
        return []

    def finish(self, trainer: Any, output: Path) -> None:
        """The books of this process, which the report reads; of recorded members there are none."""
        if self.arguments.pool != "recorded":
            books = json.dumps(self.pool.ledger.state_dict())
            (output / f"spending_{trainer.accelerator.process_index}.json").write_text(books, encoding="utf-8")

    def evaluate(
        self, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str, share: Share
    ) -> Episodes:
        """Greedy episodes; with `cost_weights` at each of them too, with `unseen_members` once more with these."""
        ours, rows = (policy, tokenizer), share.of(self.heldout)
        parts = self._at_all_weights(*ours, name, rows)
        if unseen := self.arguments.unseen_members:
            parts.append(self._played(*ours, f"{name}, {', '.join(unseen)} added", rows, list(self.pool.members)))
        return Episodes.merged(parts)

    def validate(self, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, share: Share) -> Episodes:
        """As `evaluate`, without the unseen members."""
        rows = share.of(self.aside)
        return Episodes.merged(self._at_all_weights(policy, tokenizer, self.config.objective, rows))

    def _at_all_weights(
        self, policy: Any, tokenizer: Any, name: str, questions: Sequence[Mapping[str, Any]]
    ) -> list[Episodes]:
        named = {name: None, **{f"{name}, price sensitivity {w:g}": w for w in self.settings.cost_weights}}
        return [self._played(policy, tokenizer, told, questions, self.names, w) for told, w in named.items()]

    def _played(
        self,
        policy: Any,
        tokenizer: Any,
        name: str,
        questions: Sequence[Mapping[str, Any]],
        names: Sequence[str],
        weight: float | None = None,
    ) -> Episodes:
        from routers.tasks.think_route import world
        from routers.tasks.think_route.evaluate import evaluate_agent

        pool = world.make_pool(self.arguments, self.run, self.table)  # not on the training's ledger
        return evaluate_agent(
            policy,
            tokenizer,
            self._world(tokenizer, pool, names),
            self.settings,
            [weighed(row, self.settings.cost_weights, weight) for row in questions],
            self._rewards,
            name=name,
        )

    def baselines(self, share: Share) -> Episodes | None:
        """Members asked once, and rules over them; of recorded replies only: live members would be paid for all."""
        from routers.tasks.think_route.evaluate import agent_baselines

        if self.arguments.pool != "recorded" or self.table is None:
            return None
        return agent_baselines(
            self.table,
            self.names,
            share.of([weighed(row, self.settings.cost_weights) for row in self.heldout]),
            self.train,
            self._rewards,
            metric=self.arguments.metric,  # type: ignore[arg-type]  # checked by ThinkRoute
        )

    def report(self, evaluation: Episodes, output: Path) -> str:
        from routers.evaluation.report import report

        return report(evaluation, output, title="Think/route")
