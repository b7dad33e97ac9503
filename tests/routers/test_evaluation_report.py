"""Tables, pictures and the page: what they say, by hand; that nothing is hidden; that no text of the data can act."""

import io
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from browser import browsed, needs_chromium
from test_evaluation import episodes
from test_evaluation_episodes import COST, KNOWN, MEMBERS, QUERIES

from routers.evaluation import plot
from routers.evaluation.episodes import LOST, Episodes, Outcomes, RewardRule
from routers.evaluation.losses import NOTHING, losses
from routers.evaluation.report import report
from routers.evaluation.statistics import Paired
from routers.evaluation.tables import render, sections
from routers.pool import Ledger, Spending
from srpo.losses import LOSSES, note

HOSTILE = '<script>console.error("injected")</script><img src=x onerror="console.error(1)">" onmouseover="x()'


def by_hand() -> Episodes:
    header = {"item": "query", "score": "right answers", "rule": {"ours": {"cost_weight": 0.2}}}
    parts = [
        KNOWN.play("ours", "policy", ["cheap", "cheap", "dear", None], header=header),
        KNOWN.play("start", "start", ["dear"] * 4),
        *(KNOWN.play(name, "member", [name] * 4) for name in MEMBERS),
        KNOWN.play("random", "random", np.full((4, 2), 0.5)),
        KNOWN.play("oracle", "oracle", ["cheap", "cheap", "dear", "cheap"]),
    ]
    return Episodes.merged(parts)


def table_of(found: Episodes, place: int = 0) -> dict[str, tuple[str, ...]]:
    rows = sections(Paired(found))[place].rows
    return {row[0]: row[1:] for row in rows}


def test_the_table_by_hand() -> None:
    rows = table_of(by_hand())
    assert rows[""] == (
        "right answers",
        "95 % interval",
        "$ / 1k queries",
        "reward",
        "95 % interval",
        "valid",
        "entropy",
    )
    # the strongest simple baseline first, then the policy and its start, the oracle last
    assert list(rows)[1:] == ["cheap (cheapest)", "ours", "start", "random", "dear (dearest)", "oracle"]
    # USD per 1,000 queries: 250 x the sum over the four queries; reward (0.96 + 0.96 + 0.8 - 0.1) / 4
    ours = rows["ours"]
    assert (ours[0], ours[2], ours[3], ours[5]) == ("75.0%", "0.0025", "0.655", "75.0%")
    assert ours[6] == f"{np.log(3) - np.log(4) / 3:.2f}"  # of 2/3 and 1/3: the invalid one is no route
    assert rows["cheap (cheapest)"][0] == "50.0%" and rows["cheap (cheapest)"][3] == "0.450"
    assert rows["random"][2] == "0.0031" and rows["oracle"][2][:5] == "0.002" and rows["random"][6] == ""


def test_gains_by_hand() -> None:
    rows = table_of(by_hand(), 1)
    assert list(rows)[1:] == [
        "ours minus the start (start)",
        "ours minus the best single member = the strongest baseline of all (cheap; chosen on these very items, which "
        "favours it)",
    ]
    # against dear everywhere: reward .655 - (0.84 - 0.16 + 0.8 - 0.16) / 4, right 1, 1, 1, 0 against 1, 0, 1, 0
    start = rows["ours minus the start (start)"]
    assert (start[0], start[2]) == ("+0.325", "+25.0 pt")
    assert start[4] == "-0.0025"


def test_rewards_by_other_rules_are_not_subtracted() -> None:
    found = by_hand()
    rules = {"ours": {"cost_weight": 0.2}, "baselines": {"cost_weight": 0.4}, "start": {"cost_weight": 0.2}}
    rows = table_of(Episodes(found.frame, {**found.header, "rule": rules}), 1)
    assert [row[0] for row in rows.values()] == ["reward", "+0.325", ""]
    assert list(rows.values())[2][2] == "+25.0 pt"


def test_text_and_markdown_say_the_same() -> None:
    found = by_hand()
    text, markdown = render(found), render(found, "Title", markdown=True)
    assert "ours asked: cheap 66.7%, dear 33.3%" in text and "- ours asked: cheap 66.7%, dear 33.3%" in markdown
    assert markdown.startswith("## Title\n") and "| ours " in markdown and "**Gains**" in markdown
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    for _, block in itertools.groupby(lines, key=lambda line: line.count("|")):
        assert len({len(line) for line in block}) <= 3
    hostile = render(found.renamed({"ours": "a | b"}), markdown=True)
    assert "a \\| b" in hostile


def test_what_step_routing_adds() -> None:
    """Caps with what was used of them and violations; difficulty; rules with settings as curves, not as lines."""
    frames = []
    for name, kind, curve, usd, scores in (
        ("always-small", "member", "", 1, [1, 1, 0, 0]),
        ("always-large", "member", "", 11, [1, 1, 1, 1]),
        ("mix 0.5", "rule", "mixing", 4, [1, 1, 1, 0]),
        ("mix 0.7", "rule", "mixing", 8, [1, 1, 1, 0]),
        ("bopo", "policy", "", 3, [1, 1, 1, 1]),
    ):
        one = episodes({(name, kind): [scores]}, usd={name: usd}, curve=curve, large_calls=2.0).frame
        frames.append(one.assign(difficulty=["easy", "easy", "hard", "hard"], family=list("abab")))
    capped = frames[-1].assign(cap=2.0, used=0.5, violated=[False, True, False, False])
    found = Episodes(pd.concat([*frames, capped]), {"item": "episode", "score": "success"})
    main = table_of(found)
    # rewards by hand: what a family is shown by is its best setting, before policies; members beside it
    assert list(main)[1:] == ["always-large (dearest)", "mix 0.5", "always-small (cheapest)", "bopo"], main
    assert "expensive calls" in main[""]
    parts = {section.title: section.rows for section in sections(Paired(found))}
    assert parts["Under a cap"][1] == ("bopo", "2", "100.0%", "[100.0%, 100.0%]", "50%", "1")
    assert parts["By difficulty"][0] == ("success", "easy (2)", "hard (2)")
    assert ("bopo", "100.0%", "100.0%") in parts["By difficulty"]
    frontier = {row[0]: row[1:] for row in parts["Beyond mixing"]}
    # at cost 3 between small (.5 at 1) and the setting (.75 at 4); cost 3 of 11
    assert frontier["bopo beyond mixing"][0] == "+33.3 pt"
    assert frontier["bopo beyond mixing"][2:] == ("27.3%", "100.0%")
    # at .2 of the axis: .2 x .5 + .8; the rule's settings at .3: .3 x .5 + .7 x .75
    areas = {row[0]: row[parts["Frontier"][0].index("AUC")] for row in parts["Frontier"]}
    assert (areas["bopo"], areas["mixing"]) == ("0.900", "0.675")


def pixels(png: bytes) -> np.ndarray:
    from matplotlib.image import imread

    return np.asarray(imread(io.BytesIO(png)))[..., :3] * 255


def test_everybody_is_in_the_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every router but settings of rules has its mark and its name; names cover no mark and no other name."""
    boxes: list[Any] = []
    monkeypatch.setattr(plot, "_names", lambda axes, marks: (names(axes, marks), boxes.append(axes)))
    found = by_hand()
    png = plot.picture(found, "by hand")
    [axes] = boxes
    texts = [text for text in axes.texts if text.get_text()]
    assert sorted(name for text in texts for name in text.get_text().split("\n")) == sorted(
        ["ours", "start", "cheap (cheapest)", "dear (dearest)", "random", "oracle"]
    )
    renderer = axes.figure.canvas.get_renderer()
    extents = [text.get_window_extent(renderer) for text in texts]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(extents, 2))
    frame = axes.get_window_extent(renderer)
    assert all(frame.x0 <= box.x0 and frame.y0 <= box.y0 and box.x1 <= frame.x1 + 1 for box in extents)
    # The policy's colour (#D55E00), the start's (#0072B2) and the oracle's (#009E73) are drawn.
    for colour in ((0xD5, 0x5E, 0x00), (0x00, 0x72, 0xB2), (0x00, 0x9E, 0x73)):
        assert (np.abs(pixels(png) - colour).max(-1) < 2).sum() > 50


names = plot._names


def test_routers_at_one_place_share_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many the first, the policy before all: names that find no room would be written over each other."""
    panels: list[Any] = []
    monkeypatch.setattr(plot, "_names", lambda axes, marks: (names(axes, marks), panels.append(axes)))
    played: dict[Any, Any] = {(f"kNN {i}", "learned"): [0, 1] for i in range(20)}
    played |= {("start", "start"): [0, 1], "ours": [0, 1], ("best", "oracle"): [1, 1]}
    plot.picture(episodes(played))
    assert [text.get_text() for text in panels[0].texts] == ["ours\nstart\nkNN 0\nand 19 more", "best"]


def test_costs_that_span_a_decade_are_on_a_log_axis(monkeypatch: pytest.MonkeyPatch) -> None:
    panels: list[Any] = []
    monkeypatch.setattr(plot, "_names", lambda axes, marks: (names(axes, marks), panels.append(axes)))
    near = {("a", "member"): [1, 0], ("b", "member"): [1, 1], "ours": [1, 1]}
    for usd in ({"a": 1e-6, "b": 2e-6, "ours": 2e-6}, {"a": 1e-6, "b": 2e-5, "ours": 2e-6}):
        plot.picture(episodes(near, usd=usd))
    assert [axes.get_xscale() for axes in panels] == ["linear", "log"]


@pytest.mark.parametrize("score, cost", [(0, COST), (0, COST * 0), (1, COST * 0 + 1)])
def test_pictures_of_degenerate_pools(score: float, cost: np.ndarray) -> None:
    rule, scores = RewardRule(1.0), np.full(COST.shape, float(score))
    known = Outcomes(QUERIES, MEMBERS, scores, cost, rule(scores, cost), rule=rule)
    parts = [known.play("ours", "policy", ["dear"] * 4), *(known.play(m, "member", [m] * 4) for m in MEMBERS)]
    assert len(plot.picture(Episodes.merged(parts))) > 5000


def test_an_oracle_on_a_logarithmic_plane() -> None:
    """Its height is a line across the axes: no place in data coordinates, of which the left end would be $0."""
    cost = COST * [1.0, 100.0]
    rule = RewardRule(1.0)
    known = Outcomes(QUERIES, MEMBERS, KNOWN.score, cost, rule(KNOWN.score, cost), rule=rule)
    parts = [known.play("ours", "policy", ["dear"] * 4), *(known.play(m, "member", [m] * 4) for m in MEMBERS)]
    parts.append(known.play("oracle", "oracle", ["cheap", "cheap", "dear", "cheap"]))
    assert len(plot.picture(Episodes.merged(parts))) > 5000


def hostile() -> Episodes:
    found = by_hand()
    frame = found.frame.assign(query=HOSTILE, family=[HOSTILE + str(i % 2) for i in range(len(found))])
    frame["family"] = HOSTILE + frame["item"]
    return Episodes(frame, {**found.header, "note": HOSTILE}).renamed({"ours": f"ours {HOSTILE}"})


def test_the_report_is_written_and_needs_nothing_else(tmp_path: Path) -> None:
    history = [{"step": i, "reward": 0.1 * i, "entropy": 1.0} for i in range(6)]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    text = report(by_hand(), tmp_path, title="By hand")
    assert {path.name for path in tmp_path.iterdir()} == {
        "frontier.png", "report.md", "report.html", "trainer_state.json"
    }  # fmt: skip
    assert (tmp_path / "report.md").read_text() == text
    page = (tmp_path / "report.html").read_text()
    for words in ("<h1>By hand</h1>", "Gains", "By family", "Sent where", "won by ours against cheap", "what 2?",
                  "<h2>Training</h2>", "Reward of ours: cost_weight 0.2"):  # fmt: skip
        assert words in page, words
    assert "http://" not in page and "https://" not in page and "<script" not in page
    assert page.count('src="data:image/png;base64,') == 2  # the cost plane and the training curves
    assert "lost by ours" not in page  # nothing was


def test_texts_of_the_data_cannot_act(tmp_path: Path) -> None:
    report(hostile(), tmp_path, title=HOSTILE)
    page = (tmp_path / "report.html").read_text()
    assert "<script" not in page and "<img src=x" not in page
    assert "&lt;script&gt;" in page and "default-src &#x27;none&#x27;" not in page and "default-src 'none'" in page


@needs_chromium
def test_the_report_in_a_browser(tmp_path: Path) -> None:
    """No error of any kind, with the most hostile texts; and the test would see one."""
    report(hostile(), tmp_path, title=HOSTILE)
    assert browsed((tmp_path / "report.html").as_uri(), tmp_path / "profile")[1] == []
    bad = tmp_path / "bad.html"
    bad.write_text((tmp_path / "report.html").read_text().replace("</body>", "<script>1</script></body>"))
    assert browsed(bad.as_uri(), tmp_path / "profile")[1] != []


def test_what_was_lost_is_told_by_count_and_cause(tmp_path: Path) -> None:
    """From the run's own records; a resumed run adds to them, and half a line, which a kill leaves, is passed over."""
    found = by_hand()
    report(found, tmp_path, title="T")
    assert NOTHING in (tmp_path / "report.html").read_text() and NOTHING in (tmp_path / "report.md").read_text()
    note(tmp_path, 3, "rollouts", {"dear: HTTP 500": 2, HOSTILE: 1}, 8, dropped=1, tokens=30, usd=0.25)
    note(tmp_path, 4, "steps", {"process 0: reward of 1 rows of micro-batch 1": 1})
    with (tmp_path / LOSSES).open("a") as file:
        file.write('{"step": 5, "wh')  # killed here
    with (tmp_path / LOSSES).open("a") as file:
        file.write("\n")
    note(tmp_path, 4, "rollouts", {"dear: HTTP 500": 1}, 8, dropped=0, tokens=5, usd=0.5)
    note(tmp_path, 4, "pushes", {"the Hub cannot be reached": 1})
    rows = [{"row": 1, "reason": "no prompt"}, {"row": 7, "reason": "no prompt"}, {"row": None, "reason": "left out"}]
    (tmp_path / "quarantine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ledger = Ledger()
    ledger.book("q", Spending(calls=9, failed=2, unmetered=3, cost=0.1), "dear")
    ledger.book("q", Spending(calls=5, cost=0.1), "cheap")
    (tmp_path / "spending_0.json").write_text(json.dumps({**ledger.state_dict(), "overrun": 0.125}))
    frame = found.frame.copy()
    frame.loc[(frame["router"] == "ours") & (frame["item"] == frame["item"].iloc[0]), "stop"] = LOST
    assert losses(tmp_path, Episodes(frame, found.header)).rows == [
        ("", "lost", "of", "why"),
        ("rows of data (quarantine.jsonl)", "2", "", "2 x no prompt"),
        ("rollouts of the training", "4", "16 of those batches", f"3 x dear: HTTP 500; 1 x {HOSTILE}"),
        ("rollouts left out with their groups", "1", "", "of a group too many were lost"),
        ("tokens that the policy wrote in lost rollouts", "35", "", ""),
        ("USD of lost rollouts", "0.750000", "", "members had been paid"),
        ("steps that were not made", "1", "", "1 x process 0: reward of 1 rows of micro-batch 1"),
        ("pushes to the Hub", "1", "", "1 x the Hub cannot be reached"),
        ("calls of dear", "2", "9", "without an answer in the end, retries included"),
        (
            *("attempts at dear, perhaps paid", "3", ""),
            "failed without reported usage: counted as nothing, the provider may have billed them",
        ),
        ("USD above what was reserved", "0.125000", "", "members cost more than could be known before"),
        ("items of ours", "1", "4", "the pool failed on them; left out for all"),
    ]
    report(found, tmp_path, title="T")
    page, markdown = (tmp_path / "report.html").read_text(), (tmp_path / "report.md").read_text()
    assert "<h2>What was lost</h2>" in page and "3 x dear: HTTP 500" in page and "**What was lost**" in markdown
    assert "<script" not in page and "max_lost_share" in page


def test_names_of_members_are_plain_text_and_as_long_as_a_line(recwarn: pytest.WarningsRecorder) -> None:
    """A dollar would begin a formula, which may be none; a name of 300 letters would leave no room for the picture."""
    names = ["$\\frac{", "模型", "x" * 300 + "1", "x" * 300 + "2"]
    found = episodes({(name, "member"): [0, 1] for name in names}, usd={name: i + 1 for i, name in enumerate(names)})
    assert len(plot.picture(found)) > 5000 and not [one for one in recwarn if "Glyph" in str(one.message)]
    short = f"{'x' * 24}...{'x' * 23}"
    assert {*table_of(found)} >= {"模型", f"{short}1", f"{short}2 (dearest)", "$\\frac{ (cheapest)"}
