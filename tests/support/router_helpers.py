"""A real, tiny query router, trained from nothing in seconds: "sum" goes to maths, "name" to large, all else to small.

With a price sensitivity above one half, everything goes to small.
"""

from pathlib import Path
from typing import Any

import torch

from routers.data.catalogue import Member
from routers.language.grammar import render
from routers.tasks.query_routing.settings import QuerySettings

MEMBERS = (
    Member("small", "everything, a little", 0.1, 0.4),
    Member("small-maths", "sums", 0.5, 1.0),
    Member("large", "names", 2.0, 8.0),
)
QUESTIONS = ("sum of 1 and 2", "the sum of all", "name a river", "a name please", "hello there", "what is it")
SETTINGS = QuerySettings(
    MEMBERS,
    completion_tokens=24,
    cost_weights=(0.2, 0.8),
    policy_price=(0.01, 0.02),
    typical={member.name: (20.0, 10.0) for member in MEMBERS},
    typical_usd={"small": 6e-06, "small-maths": 2e-05, "large": 0.00012},
)


def right(question: str, weight: float = 0.2) -> str:
    """Whom the policy learns to choose."""
    if weight > 0.5:
        return "small"
    return "small-maths" if "sum" in question else "large" if "name" in question else "small"


def train_query_router(folder: Path, steps: int = 120, settings: QuerySettings = SETTINGS) -> Path:
    """Save model, tokenizer and router.yaml in `folder`."""
    from srpo.scratch_lm import tiny_causal_lm, train_tokenizer

    grammar, weights = settings.grammar, settings.cost_weights or (None,)
    tags = [tag(name) for name in grammar.names for tag in (grammar.open, grammar.close)]
    texts = [settings.messages(q, cost_weight=w)[0]["content"] for q in QUESTIONS for w in weights]
    tokenizer = train_tokenizer([*texts, "why small large maths"], vocab_size=420, whole=tags)
    model = tiny_causal_lm(tokenizer, hidden=64, heads=2, intermediate=128, seed=0)
    rows: list[Any] = []
    for question in QUESTIONS:
        for weight in weights:
            prompt = tokenizer.apply_chat_template(
                settings.messages(question, cost_weight=weight), add_generation_prompt=True, return_dict=False
            )
            turn = tokenizer(render("why", right(question, weight or 0.2), grammar) + "<|im_end|>")["input_ids"]
            rows.append((prompt + turn, [-100] * len(prompt) + turn))
    width = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([row + [0] * (width - len(row)) for row, _ in rows])
    labels = torch.tensor([row + [-100] * (width - len(row)) for _, row in rows])
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        loss = torch.nn.functional.cross_entropy(model(ids).logits[:, :-1].transpose(1, 2), labels[:, 1:])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss.item() < 0.05, f"the router did not learn its routes: loss {loss.item():.3f}"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    settings.save(folder, {"table": "sha256:" + "0" * 64})
    return folder
