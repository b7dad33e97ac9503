"""Query routing as a task of the one run: recorded replies of a pool, one turn per query, one member named."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rewards.cost import warn_of_group_scale
from rewards.registry import Facts, make_rewards
from routers.data.folds import parted
from routers.data.table import ReplyTable, check_split, replies_of, spread
from routers.evaluation.episodes import Episodes, Outcomes, RewardRule
from routers.language.grammar import Grammar
from routers.language.prompts import COST_WEIGHT, Clean, Messages, family_phrase, price, weighed
from routers.tasks.query_routing.arguments import QueryRoutingArguments
from routers.tasks.query_routing.settings import QuerySettings, settings_of
from srpo.own_policy import OwnPolicy
from srpo.policy_name import FROM_NOTHING
from srpo.run.derived import source
from srpo.run.steps import check_rows_of_a_batch
from srpo.task import Corpus, Ids, Planned, RunArguments, Share
from srpo.types import Row, World

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

    from srpo.config import SRPOConfig

THOUGHT = "question"
"""The reasoning of a policy made from nothing, which has nothing to say: part of one token (`QueryRouting.corpus`)."""
QUERY_CHARS = 600
"""What such a policy is shown of a query (`QuerySettings.query_chars`)."""


class QueryRouting:
    """`srpo.task.Task` for recorded replies."""

    Arguments = QueryRoutingArguments
    episodes = Episodes
    correctness = None

    def __init__(self, arguments: QueryRoutingArguments, run: RunArguments, config: SRPOConfig):
        self.arguments, self.run, self.config = arguments, run, config
        self.grammar = Grammar()
        self.table: ReplyTable
        self.made_here = run.model_name_or_path in FROM_NOTHING
        # Every pass of the start has labels of its own.
        self.sft_draws = max(1, math.ceil(run.sft_epochs))
        self.sft_options: Mapping[str, Any] = {
            "mean": "rows",
            "num_train_epochs": run.sft_epochs / self.sft_draws,
            "train_sampling_strategy": "group_by_length",
        }

    def load(self, notes: Path) -> None:
        task = self.arguments
        if task.abstain_reward is not None and not self.own_policy(self.run.model_name_or_path):
            raise ValueError("abstain_reward is of model_name_or_path: encoder; leave it out")
        self.table = replies_of(
            task.table,
            task.catalogue,
            max_bad_share=self.run.max_bad_share,
            drop_incomplete=task.drop_incomplete,
            folder=notes,
        )
        check_split(self.table)
        if task.exact_credit and not self.own_policy(self.run.model_name_or_path):
            self._check_exact_credit()
        if self.table.log and (task.abstain_reward is not None or not self.own_policy(self.run.model_name_or_path)):
            raise ValueError(
                f"{task.table}: has a column propensity, so it is a log, which tells the outcome of one member for "
                "each query: it can train model_name_or_path: encoder, without abstain_reward"
            )
        queries = self.table.queries("train")
        chosen = spread(len(queries), self.run.train_limit)
        learned, aside = parted([queries[i]["query"] for i in chosen], self.config.eval_strategy != "no")
        self.chosen, self.aside = chosen[learned], chosen[aside]
        self.validation = [queries[i]["query_id"] for i in self.aside]
        self.queries = [queries[i] for i in self.chosen]
        check_rows_of_a_batch(len(self.queries), self.config, "the table's training split")
        # A policy that was trained to route is asked as it was then, whatever it began from.
        before = settings_of(self.run.start_from or self.run.model_name_or_path)
        show_members = not self.made_here if before is None else before.show_members
        query_chars = QUERY_CHARS if self.made_here else None
        self.settings = QuerySettings(
            members=tuple(self.table.catalogue.values()),
            grammar=self.grammar,
            completion_tokens=self.config.max_completion_length,
            chat_template_kwargs=self.config.chat_template_kwargs or {},
            cost_weights=tuple(task.cost_weights or ()),
            policy_price=(self.run.policy_price_in, self.run.policy_price_out),
            show_members=show_members if task.show_members is None else task.show_members,
            query_chars=query_chars if before is None else before.query_chars,
        ).seen_in(self.table)

    def corpus(self) -> Corpus:
        """Prompts of the training queries, and the templates of the self-teacher. A turn is four tokens: its frame, a
        member's name, the closing tag and the end."""
        args, members, grammar = self.config, self.settings.members, self.grammar
        texts = [self._prompt(row)[0]["content"] for row in self.table.queries("train")]
        texts += [args.reprompt_template, args.solution_template, args.feedback_template]
        names, pair = (grammar.think, grammar.route), (grammar.open, grammar.close)
        tags = [tag(name) for name in names for tag in pair]
        frame = f"{grammar.open(names[0])}{THOUGHT}{grammar.close(names[0])}{grammar.open(names[1])}"
        # Digits are tokens of their own, so the prices would be a fifth of every prompt.
        prices = sorted({price(member) for member in members if member.priced})
        return Corpus(texts, [frame, *tags, *prices, *self.table.members])

    def rows(self, tokenizer: PreTrainedTokenizerBase) -> list[Row]:
        from srpo.texts import without_control_tokens

        self.clean = without_control_tokens(tokenizer)
        special = tokenizer.all_special_tokens
        if odd := [name for name in self.table.members if any(token in name for token in special)]:
            raise ValueError(
                f"{self.arguments.table}: the member name {odd[0]!r} holds a control token of the policy, which could "
                "not be read again when it is served: rename the member in table and catalogue"
            )
        rows = [weighed(row, self.settings.cost_weights) for row in self.queries]
        return [{"prompt": self._prompt(row, self.clean), **row} for row in rows]

    def _passes(self) -> int:
        """Of RL over the queries in `max_steps`, which need prompts of their own; `num_train_epochs` repeats one."""
        config = self.config
        if config.max_steps < 1:
            return 1
        batches = config.max_steps * config.gradient_accumulation_steps / config.steps_per_generation
        prompts = config.generation_batch_size / config.num_generations
        return max(1, math.ceil(batches * prompts / len(self.queries)))

    def _training_prompt(self, clean: Clean, stream: int) -> Callable[[Mapping[str, Any]], Messages]:
        """Row -> prompt, with `word_dropout` a new one at each call; `stream` numbers the sources of chance."""
        from routers.tasks.query_routing.sft_rows import thinned

        if not (dropout := self.arguments.word_dropout):
            return lambda row: self._prompt(row, clean)
        rng = np.random.default_rng([self.config.seed, stream])
        return lambda row: self._prompt({**row, "query": thinned(row["query"], dropout, rng)}, clean)

    def _prompt(self, row: Mapping[str, Any], clean: Clean | None = None) -> Messages:
        return self.settings.messages(row["query"], cost_weight=row.get(COST_WEIGHT), clean=clean)

    def made_from(self) -> tuple[dict[str, Any], dict[str, Any]]:
        task = self.arguments
        start: dict[str, Any] = {"table": source(task.table), "catalogue": source(task.catalogue)}
        names = (
            "drop_incomplete cost_weight cost_weights rewards show_members sft_temperature sft_foretold word_dropout"
        )
        start |= {name: getattr(task, name) for name in names.split()}
        start["success_reward_threshold"] = self.config.success_reward_threshold
        return start, {"format_weight": task.format_weight}

    def prepare(self, output: Path, rows: list[Row]) -> list[Row]:
        if not self.arguments.word_dropout or not rows:  # none: it is evaluated only
            return rows
        prompt = self._training_prompt(self.clean, 1)
        return [{**row, "prompt": prompt(row)} for _ in range(self._passes()) for row in rows]

    def sft_rows(self, tokenizer: PreTrainedTokenizerBase, ends: Sequence[int]) -> list[Ids]:
        from routers.tasks.query_routing.sft_rows import foretold, sft_turns, with_soft_label
        from srpo.sft import encode_turn
        from srpo.teacher.prompt import Templates, reprompt
        from srpo.texts import without_control_tokens

        args, clean = self.config, without_control_tokens(tokenizer)
        templates = Templates(args.reprompt_template, args.solution_template, args.feedback_template)
        some = spread(len(self.queries), self.run.sft_limit)
        rows = [weighed(self.queries[i], self.settings.cost_weights) for i in some]
        places = self.chosen[some]
        correct, usd = self.table.correct_matrix("train")[places], self.table.cost_matrix("train")[places]
        rules = [self.rule(row.get(COST_WEIGHT)) for row in rows]
        utility = np.stack([rule(*outcome) for rule, *outcome in zip(rules, correct, usd, strict=True)])
        share, guessed = self.arguments.sft_foretold, None
        if share:
            told = foretold(Outcomes.of_table(self.table, self.rule(None), "train", places))
            guessed = np.stack([rule(*one) for rule, *one in zip(rules, *told, strict=True)])
        turns = sft_turns(
            rows,
            correct,
            utility,
            self._training_prompt(clean, 0),
            self.table.members,
            self.grammar,
            np.random.default_rng(args.seed),
            temperature=self.arguments.sft_temperature,
            guessed=guessed,
            share=share,
            draws=self.sft_draws,
            success=args.success_reward_threshold,
            think=(lambda row: THOUGHT) if self.made_here else family_phrase,
            reprompt=lambda prompt, demonstration, feedback: reprompt(prompt, demonstration, feedback, templates),
        )
        mask = self.settings.mask(tokenizer)
        return [
            with_soft_label(encode_turn(turn, tokenizer, ends, args.chat_template_kwargs), mask, turn["label"])
            for turn in turns
        ]

    def plan(self) -> Planned:
        usd = self.table.cost_matrix("train")
        return Planned(
            len(self.queries),
            [f"{len(self.table.members)} members by recorded replies: no calls"],
            usd_expected=float(usd.mean()),
            expected_if="members by chance",
            usd_most=float(usd.max()),
            paid=False,
        )

    def save(self, folder: Path) -> None:
        self.settings.save(folder, self.made_from()[0])

    def own_policy(self, name: str) -> OwnPolicy | None:
        from routers.tasks.query_routing.encoder.policy import encoder_policy

        return encoder_policy(self, name)

    def world(self) -> World:
        from routers.tasks.query_routing.world import RecordedWorld

        return RecordedWorld(self.table, self.grammar)

    def environment(self, tokenizer: PreTrainedTokenizerBase) -> None:
        return None

    def _check_exact_credit(self) -> None:
        """Of a language model; the trainer checks again, after the start has been trained."""
        from srpo.trainer.arguments import check_each_of

        if not self._masks_routes:
            raise ValueError(
                "exact_credit needs routes among the members' names: leave mask_routes at its default, and "
                "use_vllm and use_transformers_continuous_batching false"
            )
        check_each_of(self.config, len(self.table.members))

    @property
    def _masks_routes(self) -> bool:
        others = self.config.use_vllm or self.config.use_transformers_continuous_batching
        return not others if self.arguments.mask_routes is None else self.arguments.mask_routes

    def allowed_tokens(self, tokenizer: PreTrainedTokenizerBase) -> Any:
        return self.settings.mask(tokenizer, each=self.arguments.exact_credit) if self._masks_routes else None

    def rewards(self) -> tuple[list[Any], list[float]]:
        facts = Facts(self.table.max_cost, per_prompt=self.arguments.cost_weights is not None)
        return make_rewards(self.arguments.reward_weights(), facts)

    def callbacks(self) -> list[TrainerCallback]:
        from routers.tasks.query_routing.guard import Collapse

        warn_of_group_scale(self.config.scale_rewards, self.arguments.reward_weights().get("cost", 0.0))
        correct, usd = self.table.correct_matrix("train"), self.table.cost_matrix("train")
        reward, families = self.rule(None)(correct, usd)[self.chosen], [query["family"] for query in self.queries]
        return [Collapse(reward, families, stop=self.arguments.on_collapse == "stop")]

    def finish(self, trainer: Any, output: Path) -> None:
        return None

    def evaluate(
        self, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str, share: Share
    ) -> Episodes:
        """Greedy routes among the members; with `cost_weights`, one router per weight."""
        return self._played(policy, tokenizer, name, share, "heldout", None)

    def validate(self, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, share: Share) -> Episodes:
        return self._played(policy, tokenizer, self.config.objective, share, "train", self.aside)

    def _played(
        self, policy: Any, tokenizer: Any, name: str, share: Share, split: str, places: np.ndarray | None
    ) -> Episodes:
        from routers.tasks.query_routing.evaluate import evaluate_policy

        weights = self.arguments.cost_weights
        parts = [
            evaluate_policy(
                policy,
                tokenizer,
                self.table,
                self.settings,
                name=name if weight is None else f"{name}, price sensitivity {weight:g}",
                share=share,
                limit=self.run.heldout_limit,
                split=split,
                places=places,
                policy_price=(self.run.policy_price_in, self.run.policy_price_out),
                rule=self.rule(weight),
                cost_weight=weight,
                abstain_reward=self.arguments.abstain_reward,
            )
            for weight in (weights or (None,))
        ]
        return Episodes.merged(parts)

    def rule(self, weight: float | None) -> RewardRule:
        """The training reward at a price sensitivity; None: the recipe's, or the mean of several."""
        weights, several = self.arguments.reward_weights(), self.arguments.cost_weights
        if weight is None:
            weight = sum(several) / len(several) if several else weights.get("cost", 0.0)
        return RewardRule(self.table.max_cost, weight, weights.get("format", 0.0))

    def baselines(self, share: Share) -> Episodes:
        """At the first of `cost_weights`, where the policy has several: that is what it routes by unasked."""
        from routers.baselines.play import table_baselines

        rule = self.rule(next(iter(self.arguments.cost_weights or ()), None))
        return table_baselines(self.table, rule, share=share, limit=self.run.heldout_limit)

    def report(self, evaluation: Episodes, output: Path) -> str:
        from routers.baselines.from_log import told_by_log
        from routers.evaluation.report import report
        from routers.tasks.query_routing.evaluate import guarded

        told = report(evaluation, output, title=f"Query routing: {self.arguments.table}")
        return "\n".join(filter(None, [told, guarded(evaluation), told_by_log(evaluation)]))
