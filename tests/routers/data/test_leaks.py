"""Held-out queries that nearly repeat a training query are found, and nothing else is."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest

from routers.data.catalogue import Member
from routers.data.leaks import SIMILAR, leaks
from routers.data.table import ReplyTable, replies_of

PRICES = {"m": Member("m", "x", 0.0, 0.0)}


def made(train: list[str], heldout: list[str]) -> ReplyTable:
    texts = [(text, "train") for text in train] + [(text, "heldout") for text in heldout]
    row = {"member": "m", "correct": 1}
    return ReplyTable([{**row, "query_id": i, "query": t, "split": s} for i, (t, s) in enumerate(texts)], PRICES)


def sentences(count: int, seed: int) -> list[str]:
    words = np.array([f"word{i}" for i in range(3000)])
    rng = np.random.default_rng(seed)
    return [f"in the following question say {' '.join(rng.choice(words, 25))} to whom" for _ in range(count)]


def test_a_planted_leak_is_found_and_a_shared_template_is_none() -> None:
    train, heldout = sentences(3000, 0), sentences(1000, 1)
    for i in range(40):  # in other case, with other marks, and with one word more
        heldout[25 * i] = f"{train[70 * i].upper().replace(' TO WHOM', ', to whom')} please!"
    found = leaks(made(train, heldout))
    assert (found.heldout, found.near, found.same_but_numbers) == (1000, 40, 0)
    for pair in found.examples:
        assert pair["heldout"].startswith(pair["train"][:60]) and 1 > pair["similarity"] >= SIMILAR
    assert leaks(made(train, sentences(1000, 1))).near == 0


def test_similarity_by_hand() -> None:
    """Six words of one text, one of which differs in the other: 5 of 6 words and 4 of 5 pairs are shared, and with
    idf = ln(3 / (1 + df)) + 1 = 1 (both texts) or 1.405 (one) the cosine is 9 / (9 + 2 * 1.405 ** 2)."""
    both = made(["alpha beta gamma delta epsilon zeta"], ["alpha beta gamma delta epsilon eta"])
    expected = 9 / (9 + 2 * (np.log(3 / 2) + 1) ** 2)
    assert expected < SIMILAR and leaks(both).near == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("routers.data.leaks.SIMILAR", 0.5)
        (pair,) = leaks(both).examples
    assert pair["similarity"] == pytest.approx(expected, abs=1e-3)


def test_one_template_with_other_numbers_is_told() -> None:
    found = leaks(made([f"what is {i} + {i * 7}?" for i in range(50)], ["What is 3.5 + 1,000", "what is 2 - 1"]))
    assert found.same_but_numbers == 1 and str(found).startswith("0.0% of 2 held-out queries nearly repeat")
    assert leaks(made([], ["alone"])).near == leaks(made(["alone"], [])).heldout == 0


def test_a_run_notes_what_its_table_leaks(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train = sentences(20, 0)
    rows = [{"query": text, "split": "train", "m": 1} for text in train]
    rows.append({"query": f"{train[3]} indeed", "split": "test", "m": 1})
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "catalogue.yaml").write_text("members:\n  - {name: m, descriptor: d, price_in: 0, price_out: 0}\n")
    with caplog.at_level(logging.WARNING):
        replies_of(
            str(tmp_path / "t.jsonl"), None, max_bad_share=0.0, drop_incomplete=False, folder=tmp_path / "notes"
        )
    told = json.loads((tmp_path / "notes" / "leaks.json").read_text())
    assert told["near"] == 1 and told["examples"][0]["train"] == train[3]
    assert "100.0% of 1 held-out queries nearly repeat a training query" in caplog.text
