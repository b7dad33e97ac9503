"""Small things that several tests need."""

from pathlib import Path

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
