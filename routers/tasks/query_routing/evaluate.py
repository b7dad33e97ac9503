"""Score a routing policy on held-out queries: accuracy, cost and reward beside every member, random and the oracle.

    python scripts/evaluate.py --model outputs/quickstart/srpo --output outputs/quickstart/evaluation
    python scripts/evaluate.py --model user/router --table pool.parquet --catalogue prices.yaml --output here

Prints the table and writes `evaluation.json` and `frontier.png` into the output directory, and what they were made
from; a directory with the results of a training run, or of another evaluation, is refused.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from routers.data.billing import token_usd
from routers.data.table import SPLITS, ReplyTable, check_split, replies_of, spread
from routers.evaluation.episodes import RewardRule
from routers.evaluation.report import EVALUATION, Evaluation, evaluate_routes
from routers.evaluation.statistics import family_routes
from routers.language.grammar import Grammar, parse
from routers.language.prompts import policy_prompt
from srpo.policy_name import named_policy
from srpo.quarantine import MAX_BAD_SHARE
from srpo.ranges import at_least, between, ranged
from srpo.rollout.greedy import generate
from srpo.run.derived import made_from, mark, source, unmark
from srpo.run.results import check_results


def evaluate_policy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    table: ReplyTable,
    name: str = "policy",
    split: str = "heldout",
    limit: int | None = None,
    policy_price: tuple[float, float] = (0.0, 0.0),
    cost_weight: float = 0.2,
    format_weight: float = 0.2,
    grammar: Grammar | None = None,
    batch_size: int = 64,
    max_new_tokens: int = 64,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> Evaluation:
    """Let the policy route the queries of a split, greedily, and compare its routes with the recorded outcomes.

    Args:
        model, tokenizer: the policy; its mode (train or eval) is left as it was, and no random number is drawn.
        table: the pool.
        name: how tables call the policy.
        split: "heldout" or "train".
        limit: this many queries only, spread evenly over the split (which lists one family after the other).
        policy_price: USD per million prompt and completion tokens of the policy itself.
        cost_weight, format_weight: of the reward, as in training.
        grammar, chat_template_kwargs: as in training.
        batch_size, max_new_tokens: of generation. A turn that does not end within ``max_new_tokens`` is not valid.

    Raises:
        ValueError: the split has no queries, or the limit is not positive.
    """
    grammar = grammar or Grammar()
    check_split(table, split)
    queries = table.queries(split)
    chosen = spread(len(queries), limit)
    queries = [queries[i] for i in chosen]
    members = list(table.catalogue.values())
    prompts = [
        tokenizer.apply_chat_template(
            policy_prompt(query["query"], members, grammar),
            add_generation_prompt=True,
            tokenize=False,
            **(chat_template_kwargs or {}),
        )
        for query in queries
    ]
    texts, tokens_in, tokens_out = generate(model, tokenizer, prompts, batch_size, max_new_tokens)
    actions = [parse(text, table.members, grammar) for text in texts]
    if not any(action.member for action in actions):
        print(
            f"warning: none of {len(texts)} completions is a valid action on this pool (members: "
            f"{', '.join(table.members)}). Was the policy trained on another pool, or are {max_new_tokens} new tokens "
            f"too few? First problem: {actions[0].error}",
            file=sys.stderr,
        )
    rule = RewardRule(table.max_cost, cost_weight, format_weight)
    return evaluate_routes(
        name,
        [action.member for action in actions],
        queries,
        table.members,
        table.correct_matrix(split)[chosen],
        table.cost_matrix(split)[chosen],
        rule,
        own_cost=token_usd(np.array(tokens_in), np.array(tokens_out), *policy_price),
        split=split,
        baselines=_baselines(table, rule, [query["family"] for query in queries]),
    )


def _baselines(table: ReplyTable, rule: RewardRule, families: Sequence[str]) -> dict[str, np.ndarray]:
    train = table.queries("train")
    if not train or not any(families):
        return {}
    rewards = rule(table.correct_matrix("train"), table.cost_matrix("train"))
    return {"best per family": family_routes([query["family"] for query in train], rewards, families)}


def load_checkpoint(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer of a directory (full model or LoRA adapter) or Hub id, on the GPU if there is one.

    Raises:
        FileNotFoundError: a path that does not exist, or a directory without a model.
    """
    with named_policy(name):
        if (Path(name) / "adapter_config.json").exists():
            from peft import AutoPeftModelForCausalLM

            model = AutoPeftModelForCausalLM.from_pretrained(name)
        else:
            model = AutoModelForCausalLM.from_pretrained(name, dtype="auto")
        tokenizer = AutoTokenizer.from_pretrained(name)
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def main(argv: Sequence[str] | None = None) -> Evaluation:
    """Command line; returns the evaluation that it wrote."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    usd, count = ranged(at_least(0)), ranged(at_least(1), whole=True)
    parser.add_argument("--model", required=True, help="checkpoint directory, LoRA adapter directory or Hub id")
    parser.add_argument(
        "--table", default="quickstart", help="quickstart, a parquet/jsonl/json/csv/tsv file, or a Hub id"
    )
    parser.add_argument("--catalogue", help="prices and descriptors (YAML); default: catalogue.yaml beside the table")
    parser.add_argument(
        "--max-bad-share", type=ranged(between(0, 1)), default=MAX_BAD_SHARE, help="of its rows, as in training"
    )
    parser.add_argument("--drop-incomplete", action="store_true", help="leave out queries that lack a member's row")
    parser.add_argument("--split", choices=SPLITS, default="heldout")
    parser.add_argument("--output", required=True, type=Path, help="directory for evaluation.json and frontier.png")
    parser.add_argument("--name", default="policy", help="how the table calls the policy")
    parser.add_argument("--limit", type=count, help="this many queries only")
    parser.add_argument("--policy-price-in", type=usd, default=0.0, help="USD per million prompt tokens")
    parser.add_argument("--policy-price-out", type=usd, default=0.0, help="USD per million completion tokens")
    weight = ranged(between(0, 1, open_high=True))
    parser.add_argument("--cost-weight", type=weight, default=0.2, help="of the reward, as in training")
    parser.add_argument("--format-weight", type=ranged(at_least(0)), default=0.2, help="of the reward, as in training")
    parser.add_argument("--batch-size", type=count, default=64)
    parser.add_argument("--max-new-tokens", type=count, default=64)
    args = parser.parse_args(argv)
    told = {key: value for key, value in vars(args).items() if key not in ("output", "batch_size")}
    contents = {f"{key}_content": source(told[key]) for key in ("model", "table", "catalogue")}
    made = made_from(**told, **contents)
    try:
        check_results(args.output, EVALUATION, made)
        table = replies_of(
            args.table,
            args.catalogue,
            max_bad_share=args.max_bad_share,
            drop_incomplete=args.drop_incomplete,
            folder=args.output,
        )
        model, tokenizer = load_checkpoint(args.model)
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    evaluation = evaluate_policy(
        model,
        tokenizer,
        table,
        name=args.name,
        split=args.split,
        limit=args.limit,
        policy_price=(args.policy_price_in, args.policy_price_out),
        cost_weight=args.cost_weight,
        format_weight=args.format_weight,
        batch_size=args.batch_size,
        max_new_tokens=args.max_new_tokens,
    )
    unmark(args.output / EVALUATION)
    paths = evaluation.write(args.output)
    mark(args.output / EVALUATION, made)
    print(evaluation.text())
    print("\n" + "\n".join(str(path) for path in paths))
    return evaluation
