"""Numbers keep what makes them numbers, in every grader: by hand, and on the recorded replies."""

import pytest

from routers.data.table import quickstart_table
from routers.evaluation.answers import exact_match, f1, f1_of_one_answer, normalise, numeric
from routers.quickstart.grade import grade
from routers.tasks.think_route.sft_rows import result_of

DIFFERENT = [
    ("-5", "5"), ("\u22125", "5"), ("\u20135", "5"), ("- 5", "5"), ("$-5", "$5"), ("-$5", "5"), ("-5km", "5km"),
    ("x=-5", "x=5"), ("1.5", "15"), ("v1.5", "v15"), ("GPT-3.5", "GPT-35"), ("1.5km", "15km"), ("1/2", "12"),
    ("\u00bd", "12"), ("5%", "5"), ("5 percent", "5"), ("50%", "0.5"), ("1e-3", "1e3"), ("1e3", "13"), ("1,5", "15"),
    ("0,123", "123"), ("1.234,56", "123456"), ("5-10", "510"), ("5-10", "-510"), ("2001-02-03", "20010203"),
    ("12:30", "1230"), ("3:1", "31"), ("1.2.3", "123"), ("5^2", "52"), ("2*3", "23"), ("5....6", "56"), ("007", "7"),
    ("<5", "5"),
    ("-(5)", "5"), ("\u207b5", "5"), ("\u00b15", "5"), ("\u22605", "5"), ("-$.50", "0.5"),
    ("\u20ac5", "$5"), ("10\u00b2", "10"), ("(5,-3)", "53"), ("\u0663\u066b\u0665", "35"), ("3rd", "3"),
    ("1 \u2212 2", "12"), ("5'10\"", "510"), ("1e3-2e3", "10002000"), ("12:30 pm", "1230 pm"), (".5", "5"),
]  # fmt: skip
SAME = [
    ("-(5)", "-5"), ("\u22125", "-5"), ("\u20135", "-5"), ("\uff0d5", "-5"), ("- 5", "-5"), ("+5", "5"),
    ("-0", "0"), ("5.", "5"),
    ("(5)", "5"), ("5!", "5"), (".5", "0.5"), ("1.50", "1.5"), ("5.0", "5"), ("$1,000.50", "1000.5"), ("$5", "5"),
    ("5 \u20ac", "\u20ac5"), ("1'234", "1,234"), ("1\u202f234", "1234"), ("1,00,000", "100000"), ("1e3", "1,000"),
    ("5 %", "5%"), ("5 per cent", "5 percent"), ("\u0663\u0664", "34"), ("\uff13\uff0e\uff15", "3.5"),
    ("1 / 2", "1/2"),
    ("\u00bd", "1/2"), ("5\u201310", "5-10"), ("2001\u201302\u201303", "2001-02-03"), ("**-5**", "-5"),
    ("1,5", "1,5"), ("the 5 apples.", "5 apples"), ("9" * 5000, "9" * 5000), ("1e999999999", "1E999999999"),
]  # fmt: skip


@pytest.mark.parametrize(("answer", "gold"), DIFFERENT)
def test_different_numbers_never_match(answer: str, gold: str) -> None:
    for one, other in ((answer, gold), (gold, answer)):
        assert exact_match(one, [other]) == 0.0
        assert f1_of_one_answer(one, [other]) < 1.0 and f1(one, [other]) < 1.0
        if answer not in ("007", "3rd"):  # these two have the value
            assert grade("How much?", one, [other]) == numeric(one, [other]) == 0.0


@pytest.mark.parametrize(("answer", "gold"), SAME)
def test_spellings_of_one_number_match(answer: str, gold: str) -> None:
    for one, other in ((answer, gold), (gold, answer)):
        assert exact_match(one, [other]) == f1(one, [other]) == f1_of_one_answer(one, [other]) == 1.0


@pytest.mark.parametrize(
    ("answer", "gold", "points"),
    [
        ("not 1000", "1000", 0), ("it isn't 5", "5", 0), ("it isn\u2019t 5", "5", 0), ("no 5", "5", 0),
        ("7 million", "7", 0), ("7 million", "7,000,000", 1), ("7k", "7", 0), ("7k", "7000", 1), ("7M", "7e6", 1),
        ("7m", "7", 1),
        ("$1.5M", "1500000", 1), ("5 mil", "5", 0), ("!= 5", "5", 0),
        ("5 hundred thousand", "500000", 1), ("2.5 dozen", "30", 1), ("7-million", "7", 0),
        ("\u20137", "7", 0), ("\u20137", "-7", 1), ("minus 5", "5", 0), ("minus 5", "-5", 1), ("negative 5", "-5", 1),
        ("at least 5", "5", 0), ("more than 5", "5", 0), ("5 or six", "5", 0), ("half of 10", "10", 0),
        ("5 and a half", "5", 0), ("5-10", "5", 0), ("5-10", "-10", 0), ("2001-02-03", "2001", 0), ("1/2", "0.5", 1),
        ("5%", "5", 0), ("5%", "5 percent", 1), ("\u20ac5", "$5", 0), ("$5", "5", 1), ("GPT-4", "-4", 0),
        ("<5", "5", 0),
        ("1,5", "1.5", 0), ("1,5", "15", 0), ("10^3", "10", 0), ("5 x 10^3", "5", 0), ("The answer is 18.", "18", 1),
        ("x = 5", "5", 1), ("\\boxed{18}", "18", 1), ("-5\u00b0C", "-5", 1), ("1/0", "1", 0), ("1e999", "1e999", 0),
        ("\u0663", "3", 1), ("3rd", "3", 1),
        ("US$5", "5", 1), ("US$5", "$5", 1), ("US$5", "\u20ac5", 0), ("B12", "12", 0),
        ("5 pairs of shoes", "5", 1), ("12 times a week", "12", 1), ("5 miles over the hill", "5", 1),
        ("over 5", "5", 0), ("up to 5", "5", 0), ("twice 5", "5", 0), ("5 or more", "5", 0), ("5 is wrong", "5", 0),
        ("1 1/2", "1.5", 1), ("1\u00bd", "1.5", 1), ("-1 1/2", "-1.5", 1), ("-1 1/2", "-0.5", 0), ("1 3/2", "2.5", 0),
        ("3 and 1/2", "3.5", 0), ("1 1/2", "11/2", 0), ("2 1/2%", "2.5%", 1),
        ("\\frac{1}{2}", "0.5", 1), ("-\\frac{3}{4}", "-3/4", 1), ("\\dfrac12", "1/2", 1), ("2\\frac{1}{2}", "2.5", 1),
        ("\\frac{1}{2}", "12", 0), ("5\\%", "5%", 1), ("\\$5", "5", 1), ("\\frac{x}{2}", "2", 0),
        ("\\sqrt{2}", "2", 0), ("sqrt(2)", "2", 0), ("\u221a2", "2", 0), ("2\\pi", "2", 0), ("2\u03c0", "2", 0),
    ],
)  # fmt: skip
def test_what_a_text_states(answer: str, gold: str, points: float) -> None:
    assert numeric(answer, [gold]) == points


@pytest.mark.parametrize(
    ("reply", "gold", "points"),
    [
        ("\u22125", "5", 0), ("\u20135", "-5", 1), ("It is 7 million", "7", 0), ("It is not 5", "5", 0),
        (".5", "5", 0),
        (".5", "0.5", 1), ("5%", "5", 0), ("12,34", "1234", 0), ("1e3", "1000", 1), ("5 * 9 / 10 = 4.5", "45", 0),
    ],
)  # fmt: skip
def test_the_grader_of_recorded_replies_reads_the_same_numbers(reply: str, gold: str, points: float) -> None:
    assert grade("How much?", reply, [gold]) == points


def test_normal_forms() -> None:
    assert normalise("The total is $1,234.50, i.e. \u22123%") == "total is $1234.5 ie -3%"
    assert normalise("1,234.5") == "1234.5" and normalise("1e25") == "1e25" and normalise("1e3") == "1000"


def test_recorded_replies_are_paid_for_the_right_number() -> None:
    """No reply earns exact match with another number than the gold; two more differ from the recorded grade in words
    ("orange-basket", as in SQuAD) and in which line counts as the result."""
    table, paid = quickstart_table(), []
    for query in table.queries():
        gold = table.gold(query["query_id"])
        for member in table.members:
            found = table.lookup(query["query_id"], member)
            if found.correct == 0 and exact_match(result := result_of(found.reply), gold):
                paid.append((result, gold[0]))
    assert sorted(paid) == [("10.", "10"), ("orange-basket", "orangebasket")]
