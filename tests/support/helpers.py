"""Small things that several tests need."""

from pathlib import Path
from typing import Any

TEXTS = [
    "What is 12 plus 30? Answer: 42",
    "Which country has the capital Lima? Answer: Peru",
    "Reverse the word stone. Answer: enots",
    "Route the query to a model: <think>easy</think><route>calculator</route>",
]


def save_tiny_model(folder: Path, hidden: int = 32, layers: int = 2, seed: int = 0) -> Path:
    """Saves a Qwen3-type model of about 30,000 parameters and a tokenizer of 300 tokens; takes well under a second."""
    from srpo.scratch_lm import tiny_causal_lm, train_tokenizer

    tokenizer = train_tokenizer(TEXTS, vocab_size=300)
    model = tiny_causal_lm(tokenizer, hidden=hidden, layers=layers, heads=2, intermediate=2 * hidden, seed=seed)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


def greedy_turn(model: Any, tokenizer: Any, prompt: str, tokens: int) -> tuple[str, int]:
    """The policy's turn after a rendered prompt, and its length in tokens (the end token counts)."""
    from srpo.rollout.generator import TransformersGenerator
    from srpo.rollout.sampling_rules import Sampling
    from srpo.rollout.special_tokens import end_ids
    from srpo.rollout.turns import Request
    from srpo.texts import opened_by, text_of

    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    made = TransformersGenerator(model.eval(), tokenizer, Sampling(temperature=0), eos_ids=end_ids(model, tokenizer))
    [turn] = made.generate([Request(0, tuple(ids), "", tokens)])
    return opened_by(tokenizer, ids) + text_of(tokenizer, turn.ids), len(turn.ids)
