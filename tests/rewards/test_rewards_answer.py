"""How answers are graded, and what whole rewards add up to: numbers by hand."""

import math
import random

import pytest
from think_route_cases import reward

from rewards import (
    additive_rewards,
    format_reward,
    make_answer_reward,
    make_cost_reward,
    make_invalid_action_reward,
    router_r1_rewards,
    xrouter_rewards,
)
from routers.evaluation.answers import (
    METRICS,
    choice,
    contains,
    exact_match,
    f1,
    f1_of_one_answer,
    normalise,
    numeric,
    score,
)


@pytest.mark.parametrize(
    "text, normal",
    [
        ("The Beatles", "beatles"),
        ("  A  tale of\ttwo\ncities. ", "tale of two cities"),
        ("an-other the a", "another"),  # punctuation goes first and joins, then the articles
        ("U.S.A.", "usa"),
        ("U.S. (the) states!", "us states"),
        ("theatre another banana", "theatre another banana"),  # articles are whole words
        ("1,234.5", "1234.5"),
        ("Beyonce\u0301", "beyoncé"),  # decomposed and composed are one
        ("ÉCOLE", "école"),
        ("naïve", "naïve"),  # accents stay, as in SQuAD
        ("Hawai’i", "hawai’i"),  # only ASCII punctuation goes, as in SQuAD
        ("the", ""),
        ("", ""),
        ("北京。", "北京。"),
        ("don't \"stop\" — it's", "dont stop — its"),
    ],
)
def test_normalise(text: str, normal: str) -> None:
    assert normalise(text) == normal


def test_exact_match() -> None:
    assert exact_match("the Beatles!", ["Rolling Stones", "Beatles"]) == 1.0  # any alias
    assert exact_match("Beatles band", ["Beatles"]) == 0.0
    assert exact_match("Beyoncé", ["Beyonce\u0301"]) == 1.0
    assert exact_match("The", ["A"]) == 0.0  # both normalise to nothing: not the same answer
    assert exact_match("the", ["The"]) == 1.0
    assert exact_match("?", ["!"]) == 0.0
    assert exact_match("x", []) == 0.0


def test_f1() -> None:
    # "cat sat mat" against "cat on mat": 2 common words, precision 2/3, recall 2/3.
    assert f1("the cat sat mat", ["cat on mat"]) == pytest.approx(2 / 3)
    # 1 of 1 words right, 1 of 3 found: 2*1*(1/3)/(1+1/3) = 1/2. The other alias gives 2*1*(1/2)/(3/2) = 2/3.
    assert f1("Lincoln", ["Abraham Lincoln president", "Abraham Lincoln"]) == pytest.approx(2 / 3)
    # Words count as often as they occur: common = 1, 2*1/(3+1).
    assert f1("Paris Paris Paris", ["Paris"]) == pytest.approx(0.5)
    assert f1("Rome", ["Paris"]) == f1("", ["Paris"]) == f1("Rome", []) == 0.0


def test_contains() -> None:
    assert (
        contains("So the answer is 42, I think.", ["42"])
        == contains("It was the Lord of Rings!", ["Lord of rings"])
        == 1
    )
    for said in ("It is 420.", "It is -42.", "Rings of the Lord", "", "The"):
        assert contains(said, ["42", "Lord of rings"]) == 0.0, said
    assert score("cost: $5", ["5"], "contains") == 1.0
    assert "contains" not in METRICS, "a policy would write every candidate"


def test_f1_of_one_answer_does_not_pay_for_lists() -> None:
    assert f1_of_one_answer("the cat sat mat", ["cat on mat"]) == pytest.approx(2 / 3)  # 2 of 3 words: as F1
    for stuffed in ("Paris Rome", "Paris or Rome", "Paris, Rome, Madrid, Berlin", "Paris " + "x " * 50):
        assert f1(stuffed, ["Paris"]) > 0.0
        assert f1_of_one_answer(stuffed, ["Paris"]) == 0.0


@pytest.mark.parametrize(
    "answer, gold, points",
    [
        ("18", "18", 1),
        ("$18.00", "18", 1),
        ("18 apples", "18", 1),
        ("1,234,567.5", "1234567.5", 1),
        ("−7", "-7", 1),  # U+2212
        (".5", "0.5", 1),
        ("1e3", "1000", 1),
        ("0.3333333", "0.33333333", 1),  # 1e-7 relative
        ("0.3333", "0.33333333", 0),
        ("18 19", "18", 0),  # two numbers
        ("18, 19 or 20", "18", 0),
        ("eighteen", "18", 0),
        ("", "18", 0),
        ("1e999", "18", 0),
        ("12,34", "1234", 0),  # no thousands separator
    ],
)
def test_numeric(answer: str, gold: str, points: float) -> None:
    assert numeric(answer, [gold]) == points


@pytest.mark.parametrize(
    "answer, gold, points",
    [
        ("B", "B", 1),
        ("b", "B", 1),
        ("(B)", "B", 1),
        ("B.", "b", 1),
        ("B. Paris", "B", 1),
        ("B) Paris", "B", 1),
        ("B: Paris", "B", 1),
        ("Paris", "B", 0),
        ("A", "B", 0),
        ("A B C D", "B", 0),
        ("A, B", "B", 0),
        ("A or B", "A", 0),
        ("A dog", "A", 0),  # an article, not a letter
        ("Bob", "B", 0),
        ("", "B", 0),
    ],
)
def test_choice(answer: str, gold: str, points: float) -> None:
    assert choice(answer, [gold]) == points


def test_choice_by_text() -> None:
    assert choice("paris.", ["B", "Paris"]) == 1.0
    assert choice("C. Paris", ["B. Paris"]) == 0.0  # gold is a text here, and not this one


def test_score() -> None:
    assert score("Paris", ["Paris"], "em") == 1.0
    assert score(None, ["Paris"], "em") == 0.0
    assert score("4 or 5", ["4"], "numeric") == 0.0
    with pytest.raises(ValueError, match="'bleu' is unknown"):
        score("x", ["x"], "bleu")  # type: ignore[arg-type]
    for gold in ([], "Paris"):
        with pytest.raises(ValueError, match="at least one accepted answer"):
            score("x", gold, "em")


# ---------------------------------------------------------------------------------------------- rewards

SCALE = 1e-3


def columns(
    correct: float, cost: float, format_error: str = "", invalid: int = 0, **more: object
) -> dict[str, object]:
    answer = more.pop("answer", "x")
    return {
        "correct": correct,
        "cost": cost,
        "format_error": format_error,
        "invalid_actions": invalid,
        "answer": answer,
        "em": correct,
        "f1": correct,
        **more,
    }


def test_router_r1_by_hand() -> None:
    scheme = router_r1_rewards(SCALE, alpha=0.6)
    assert reward(scheme, columns(1.0, 0.25e-3)) == pytest.approx(0.4 * 1 + 0.6 * (1 - 0.25))  # 0.85
    assert reward(scheme, columns(1.0, 0.0)) == pytest.approx(1.0)
    assert reward(scheme, columns(1.0, 5e-3)) == pytest.approx(0.4)  # dearer than the scale counts as the scale
    assert reward(scheme, columns(0.0, 5e-3)) == 0.0
    assert reward(scheme, columns(1.0, 0.25e-3, "bad", 1)) == -1.0  # a format error outweighs a right answer
    assert reward(scheme, columns(0.0, 0.25e-3, "bad", answer=None)) == -1.0
    assert reward(router_r1_rewards(SCALE), columns(1.0, 0.25e-3)) == 1.0  # alpha 0: no cost
    assert reward(scheme, columns(0.5, 0.5e-3)) == pytest.approx(0.5 * (1 - 0.6 * 0.5))  # a partial score scales both


def test_xrouter_by_hand() -> None:
    scheme = xrouter_rewards(SCALE, lam=3.0, cap=0.8, K=1.0)
    assert reward(scheme, columns(1.0, 0.1e-3)) == pytest.approx(1 * (1 - min(3 * 0.1, 0.8)))  # 0.7
    assert reward(scheme, columns(1.0, 0.5e-3)) == pytest.approx(1 - 0.8)
    assert reward(scheme, columns(0.5, 0.1e-3)) == pytest.approx(0.5 * 0.7)
    assert reward(scheme, columns(0.0, 0.5e-3)) == 0.0
    assert reward(scheme, columns(1.0, 0.1e-3, "bad", 1)) == -1.0
    assert reward(xrouter_rewards(SCALE, lam=2.0, cap=0.6, K=2.0), columns(1.0, 0.1e-3)) == pytest.approx(2 - 0.2)


def test_additive_by_hand() -> None:
    scheme = additive_rewards(SCALE, cost_weight=0.2, format_weight=0.5, invalid_penalty=0.25)
    assert reward(scheme, columns(1.0, 0.25e-3)) == pytest.approx(1 - 0.2 * 0.25)
    assert reward(scheme, columns(0.0, 0.25e-3)) == pytest.approx(-0.05)
    # two invalid turns, then right: 1 - 0.05 - 0.5 * min(1, 2 * 0.25)
    assert reward(scheme, columns(1.0, 0.25e-3, "bad", 2)) == pytest.approx(0.7)
    assert reward(scheme, columns(0.0, 0.25e-3, "bad", 1, answer=None)) == pytest.approx(-0.05 - 0.5)
    assert reward(scheme, columns(0.0, 0.25e-3, "bad", 9)) == pytest.approx(-0.05 - 0.5)  # never more than 1


def test_the_weight_can_stand_in_the_row() -> None:
    for weight in (0.0, 0.3, 0.9):
        row = columns(1.0, 0.5e-3, cost_weight=weight)
        assert reward(additive_rewards(SCALE, cost_weight=None), row) == pytest.approx(1 - weight * 0.5)
        assert reward(router_r1_rewards(SCALE, alpha=None), row) == pytest.approx(1 - weight * 0.5)
        assert reward(additive_rewards(SCALE, cost_weight=weight), row) == pytest.approx(1 - weight * 0.5)
    with pytest.raises(ValueError, match=r"row 0: cost_weight is 1\.5"):
        reward(additive_rewards(SCALE, cost_weight=None), columns(1.0, 0.5e-3, cost_weight=1.5))


def test_partial_answers_and_other_columns() -> None:
    batch = {"em": [1.0, 0.0], "f1": [1.0, 0.5], "correct": [1.0, 0.25], "format_error": ["", "bad"]}
    assert make_answer_reward("em")(["", ""], **batch) == [1.0, 0.0]
    assert make_answer_reward("f1")(["", ""], **batch) == [1.0, 0.5]
    assert make_answer_reward("f1", needs_format=True)(["", ""], **batch) == [1.0, 0.0]
    with pytest.raises(ValueError, match=r"row 1 \(query_id 'b'\): em is None"):
        make_answer_reward("em")(["", ""], em=[1.0, None], query_id=["a", "b"])


def test_all_or_nothing_is_a_case_of_the_softer_format_reward() -> None:
    strict = make_invalid_action_reward(1.0)
    for error, invalid, answer in (("", 0, "x"), ("bad", 1, "x"), ("bad", 2, None), ("no answer", 0, None)):
        batch = {"format_error": [error], "invalid_actions": [invalid], "answer": [answer]}
        assert strict([""], **batch) == format_reward([""], **batch)


SCHEMES = {
    "router_r1": router_r1_rewards(SCALE, 0.0),
    "router_r1_0.9": router_r1_rewards(SCALE, 0.9),
    "xrouter": xrouter_rewards(SCALE),
    "additive": additive_rewards(SCALE),
    "additive_0.9": additive_rewards(SCALE, 0.9),
    "per_prompt": additive_rewards(SCALE, None),
}


@pytest.mark.parametrize("name", SCHEMES)
def test_the_order_of_outcomes(name: str) -> None:
    """right > wrong >= broken, whatever they cost."""
    costs = (0.0, 1e-9, 5e-4, 1e-3, 1.0, 1e300)
    for weight in (0.0, 0.5, 0.999):
        right = [reward(SCHEMES[name], columns(1.0, c, cost_weight=weight)) for c in costs]
        wrong = [reward(SCHEMES[name], columns(0.0, c, cost_weight=weight)) for c in costs]
        broken = [reward(SCHEMES[name], columns(0.0, c, "bad", 1, answer=None, cost_weight=weight)) for c in costs]
        assert min(right) > max(wrong) and min(wrong) >= max(broken)


@pytest.mark.parametrize("name", SCHEMES)
def test_rewards_depend_on_their_row_only(name: str) -> None:
    rng = random.Random(0)
    rows = [
        columns(rng.choice([0.0, 1.0]), rng.random() * 2e-3, rng.choice(["", "bad"]), 0, cost_weight=rng.random())
        for _ in range(40)
    ]
    alone = [reward(SCHEMES[name], row) for row in rows]
    for function, _ in zip(*SCHEMES[name], strict=True):  # a dear batch in between leaves no trace
        function([""] * 2, **{k: [v, v] for k, v in columns(1.0, 1e6, cost_weight=0.5).items()})
    order = rng.sample(range(40), 40)
    batch = {key: [rows[i][key] for i in order] for key in rows[0]}
    functions, weights = SCHEMES[name]
    parts = [f([""] * 40, **batch) for f in functions]
    together = [sum(w * part[j] for w, part in zip(weights, parts, strict=True)) for j in range(40)]
    assert together == [alone[i] for i in order]


def test_the_weight_is_a_dial() -> None:
    """Best member by expected reward as the weight grows: the choice changes at the weights worked by hand.

    p = right answers, c = normalised cost: free .3/0, small .5/.2, medium .65/.5, large .7/1. Additive: small beats
    free below (.5-.3)/.2 = 1, medium beats small below .15/.3 = .5, large beats medium below .05/.5 = .1.
    """
    members = {"free": (0.3, 0.0), "small": (0.5, 0.2), "medium": (0.65, 0.5), "large": (0.7, 1.0)}

    def best(scheme: tuple) -> str:
        def expected(p: float, c: float) -> float:
            right, wrong = (reward(scheme, columns(score, c * SCALE)) for score in (1.0, 0.0))
            return p * right + (1 - p) * wrong

        return max(members, key=lambda name: expected(*members[name]))

    chosen = [best(additive_rewards(SCALE, weight)) for weight in (0.05, 0.09, 0.11, 0.3, 0.49, 0.51, 0.9)]
    assert chosen == ["large", "large", "medium", "medium", "medium", "small", "small"]
    # On success only: p (1 - a c). large = medium at .7 - .7a = .65 - .325a, a = .133; medium = small at .65 - .325a =
    # .5 - .1a, a = .667; and small (.42 at a = .8) stays above free (.3).
    chosen = [best(router_r1_rewards(SCALE, alpha)) for alpha in (0.0, 0.12, 0.14, 0.6, 0.65, 0.68, 0.99)]
    assert chosen == ["large", "large", "medium", "medium", "medium", "small", "small"]


@pytest.mark.parametrize(
    "make",
    [
        lambda: router_r1_rewards(SCALE, 1.0),
        lambda: router_r1_rewards(SCALE, -0.1),
        lambda: router_r1_rewards(0.0),
        lambda: xrouter_rewards(SCALE, cap=1.0, K=1.0),
        lambda: xrouter_rewards(SCALE, lam=0.0),
        lambda: additive_rewards(SCALE, 1.0),
        lambda: additive_rewards(SCALE, 0.5, format_weight=0.4),
        lambda: additive_rewards(SCALE, None, format_weight=0.9),
        lambda: additive_rewards(SCALE, invalid_penalty=1.1),
        lambda: additive_rewards(math.nan),
        lambda: make_cost_reward(SCALE, limit=0.0),
        lambda: make_cost_reward(SCALE, needs_format=True),
        lambda: make_invalid_action_reward(-1.0),
    ],
)
def test_settings_that_could_turn_the_order_round_are_refused(make: object) -> None:
    with pytest.raises(ValueError):
        make()  # type: ignore[operator]


def test_names_in_logs() -> None:
    names = [[f.__name__ for f in scheme[0]] for scheme in (router_r1_rewards(1.0), additive_rewards(1.0))]
    assert names == [
        ["answer_reward", "format_reward", "cost_reward"],
        ["answer_reward", "invalid_action_reward", "cost_reward"],
    ]
