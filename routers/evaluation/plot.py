"""The picture of the cost plane: what every router scores, and what it costs; every one of them visible and named."""

from __future__ import annotations

import io
import itertools
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, PercentFormatter

from routers.evaluation.episodes import Episodes, Kind
from routers.evaluation.frontier import pareto_hull
from routers.evaluation.statistics import METRICS, PER_ITEMS, Estimate, Paired, sets
from routers.evaluation.tables import header, items_of, named

# Okabe and Ito's palette: told apart with any colour vision. Kinds differ in marker too, for print in grey.
_GREY, _ORANGE, _GREEN, _BLUE, _RED, _PURPLE, _SKY, _YELLOW = (
    "#666666 #E69F00 #009E73 #0072B2 #D55E00 #CC79A7 #56B4E9 #B8A200".split()
)
_STYLES: Mapping[Kind, tuple[str, str, int, str]] = {
    "member": (_GREY, "o", 55, "single member"),
    "random": (_ORANGE, "X", 75, "random"),
    "rule": (_SKY, "v", 65, "fixed rule"),
    "told": (_YELLOW, "P", 80, "told the family"),
    "learned": (_PURPLE, "^", 75, "fitted on training data"),
    "oracle": (_GREEN, "*", 170, "oracle"),
    "start": (_BLUE, "s", 65, "start of training"),
    "policy": (_RED, "D", 75, "trained policy"),
}
_STRONG = ("policy", "start")
_DECADE = 10.0
_TOGETHER = 3
"""Names of routers at one place that are written."""
_SIZE = (8.0, 5.4)
_DPI = 150


class _Mark(NamedTuple):
    name: str
    kind: Kind
    x: Estimate
    y: Estimate
    label: bool


def draw(episodes: Episodes, path: str | Path, title: str = "") -> None:
    """Write the plane of every set, one panel each, as a PNG."""
    Path(path).write_bytes(picture(episodes, title))


@contextmanager
def plain_text() -> Iterator[None]:
    """For pictures with names of others' in them: a dollar is no formula, and a letter that no font has is a box."""
    with rc_context({"text.parse_math": False}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        yield


@plain_text()
def picture(episodes: Episodes, title: str = "") -> bytes:
    """The same as bytes. Costs are those of whole episodes, the policy's own tokens included."""
    found = sets(episodes)
    width, height = _SIZE
    figure = Figure(figsize=(width * len(found), height), dpi=_DPI, layout="constrained")
    panels = figure.subplots(1, len(found), squeeze=False)[0]
    marks = []
    for axes, (name, paired) in zip(panels, found.items(), strict=True):
        axes.set_title(f"{name or title or 'Held out'}: {len(paired):,} {items_of(paired)}", loc="left", fontsize=11)
        marks.append(_panel(axes, paired))
    handles: dict[str, Any] = {}
    for axes in panels:
        handles |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.draw_without_rendering()  # fixes the layout, which decides where names fit
    for axes, some in zip(panels, marks, strict=True):
        _names(axes, some)
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def curves_picture(history: Sequence[Mapping[str, float]], names: Mapping[str, str]) -> bytes | None:
    """Training curves, a small panel each, with a running mean; None where the records hold none of them.

    Args:
        history: records with `step`.
        names: key of a record -> title of its panel.
    """
    found = {key: [(r["step"], r[key]) for r in history if key in r and "step" in r] for key in names}
    found = {key: points for key, points in found.items() if len(points) > 1 and np.isfinite(points).all()}
    if not found:
        return None
    columns = min(3, len(found))
    rows = -(-len(found) // columns)
    figure = Figure(figsize=(3.6 * columns, 2.4 * rows), dpi=110, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for axes, (key, points) in zip(panels, found.items(), strict=False):
        steps, values = np.array(points).T
        axes.plot(steps, values, color="#BBBBBB", linewidth=0.9)
        width = max(1, len(values) // 10)
        smooth = np.convolve(values, np.ones(width) / width, mode="valid")
        axes.plot(steps[width - 1 :], smooth, color=_RED, linewidth=1.6)
        axes.set_title(names[key], loc="left", fontsize=9)
        _plain(axes)
        axes.tick_params(labelsize=8)
    for axes in list(panels):
        axes.set_visible(False)
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def _panel(axes: Axes, paired: Paired) -> list[_Mark]:
    marks = [
        _Mark(named(paired, name), kind, _scaled(paired.estimate(name, "usd")), paired.estimate(name, "score"), label)
        for name, kind in paired.routers.items()
        for label in [name in paired.listed(kind) and not (kind == "rule" and paired.curves[name])]
        if paired.played(name)
    ]
    costs = np.array([mark.x.value for mark in marks])
    positive = costs[costs > 0]
    logarithmic = len(positive) == len(costs) and positive.max() / positive.min() >= _DECADE
    if logarithmic:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_xlim(0.8 * min(max(m.x.low, m.x.value / 2) for m in marks), 1.25 * max(m.x.high for m in marks))
    else:
        axes.set_xlim(0, 1.1 * max(m.x.high for m in marks) or 1.0)
    top = max(mark.y.high for mark in marks)
    bottom = min(mark.y.low for mark in marks)
    axes.set_ylim(max(0.0, bottom - 0.12 * (top - bottom)) if top > bottom else 0, top + 0.1 * (top - bottom) or 1.0)
    _curves(axes, paired, logarithmic)
    for mark in marks:
        _point(axes, mark)
    axes.set_xlabel(f"cost, USD per {PER_ITEMS:,} {items_of(paired)}")
    axes.set_ylabel(header(METRICS[0], paired))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    _plain(axes)
    return marks


def _plain(axes: Axes) -> None:
    axes.grid(color="#E5E5E5", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _scaled(usd: Estimate) -> Estimate:
    return Estimate(usd.value * PER_ITEMS, usd.low * PER_ITEMS, usd.high * PER_ITEMS)


def _curves(axes: Axes, paired: Paired, logarithmic: bool) -> None:
    """The members' mixing line (a hull), each rule's settings, each policy's, and the oracle's height."""
    members = paired.of_kind("member")
    usd = np.array([paired.mean(name, "usd") for name in members]) * PER_ITEMS
    score = np.array([paired.mean(name, "score") for name in members])
    if members:
        hull = pareto_hull(usd, score)
        x, y = [*usd[hull], max(usd.max(), axes.get_xlim()[1])], [*score[hull], score[hull[-1]]]
        if not logarithmic:
            x, y = [0.0, *x], [0.0, *y]
        axes.plot(*_mixed(x, y, logarithmic), color=_GREY, linestyle="--", linewidth=1.2, label="mixing members")
    looks = itertools.cycle(itertools.product(("-", "--", ":", "-."), (_ORANGE, _PURPLE, _SKY, _YELLOW, _BLUE)))
    for curve in dict.fromkeys(paired.curves.values()):
        names = [name for name in paired.routers if curve in (name, paired.curves[name]) and paired.played(name)]
        if not curve or not names:
            continue
        policy = paired.routers[names[0]] == "policy"
        style, colour = ("-", _RED) if policy else next(looks)
        ends = members if paired.routers[names[0]] == "rule" and len(members) == 2 else []
        points = sorted((paired.mean(n, "usd") * PER_ITEMS, paired.mean(n, "score")) for n in [*names, *ends])
        width = 2.0 if policy else 1.0
        x, y = map(list, zip(*points, strict=True))
        axes.plot(*_mixed(x, y, logarithmic), style, color=colour, lw=width, label=curve)
        axes.plot(x, y, ".", color=colour)
    for name in paired.of_kind("oracle"):
        axes.axhline(paired.mean(name, "score"), color=_GREEN, linewidth=1.0, linestyle=":")


def _mixed(x: Sequence[float], y: Sequence[float], logarithmic: bool) -> tuple[np.ndarray, np.ndarray]:
    """The line of drawing lots between neighbours, through them all: on a log axis it is bent."""
    between = np.geomspace(x[0], x[-1], 200) if logarithmic else np.linspace(x[0], x[-1], 200)
    at = np.union1d(x, np.clip(between, x[0], x[-1]))
    return at, np.interp(at, x, y)


def _point(axes: Axes, mark: _Mark) -> None:
    if not mark.label:  # a setting: its curve is drawn
        return
    colour, marker, size, what = _STYLES[mark.kind]
    strong = mark.kind in _STRONG
    # A flat sample has an interval of width 0, which rounding can turn inside out.
    arms = [[[max(e.value - e.low, 0.0)], [max(e.high - e.value, 0.0)]] for e in (mark.x, mark.y)]
    axes.errorbar(
        mark.x.value, mark.y.value, xerr=arms[0] if strong else None, yerr=arms[1], color=colour,
        linewidth=1.3 if strong else 0.8, alpha=1.0 if strong else 0.45, capsize=3 if strong else 0, zorder=3,
    )  # fmt: skip
    # Policies are hollow: what lies at the same place stays visible inside.
    face = "none" if strong else colour
    axes.scatter(
        mark.x.value, mark.y.value, s=size * (1.6 if strong else 1.0), facecolors=face, marker=marker,
        edgecolors=colour if strong else "white", linewidths=1.8 if strong else 0.8, zorder=5 if strong else 4,
        label=what,
    )  # fmt: skip


def _names(axes: Axes, marks: Sequence[_Mark]) -> None:
    """Write each name near its point, over no point, name or edge, and if there is room over no line.

    Routers at one place share a name, which says the first of them and how many more there are.
    """
    marks = [mark for mark in marks if mark.label]
    figure, to_pixels = axes.figure, axes.transData.transform
    renderer, unit = FigureCanvasAgg(figure).get_renderer(), figure.dpi / 72  # pixels per point of type
    frame = axes.get_window_extent(renderer)
    points = to_pixels([(mark.x.value, mark.y.value) for mark in marks])
    taken = [(x - 7 * unit, y - 7 * unit, x + 7 * unit, y + 7 * unit) for x, y in points]
    drawn = [line for line in axes.lines if line.get_visible()]  # a line across the axes is not in data coordinates
    lines = [_along(line.get_transform().transform(np.column_stack(line.get_data(orig=False)))) for line in drawn]
    lines += [_along(to_pixels([(m.x.value, m.y.low), (m.x.value, m.y.high)])) for m in marks]
    ink = np.concatenate(lines)
    places: list[tuple[list[_Mark], np.ndarray]] = []
    order = {kind: i for i, kind in enumerate(_STRONG)}  # the policy's name has the first choice
    first_choice = sorted(zip(marks, points, strict=True), key=lambda one: order.get(one[0].kind, len(order)))
    for mark, at in first_choice:
        same = next((some for some, other in places if np.abs(other - at).max() < unit), None)
        places.append(([mark], at)) if same is None else same.append(mark)
    for same, (x, y) in places:
        mark, more = same[0], len(same) - _TOGETHER
        name = "\n".join([*(one.name for one in same[:_TOGETHER]), *([f"and {more} more"] if more > 0 else [])])
        style: dict[str, Any] = {
            "fontsize": 9,
            "color": "#222222",
            "weight": "bold" if mark.kind in _STRONG else "normal",
        }
        text = axes.text(0, 0, name, **style)
        box = text.get_window_extent(renderer)
        text.remove()
        best = (np.inf, (0.0, 0.0, 0.0, 0.0), 0.0)
        for distance in (10.0, 16.0, 24.0, 34.0, 48.0, 66.0, 90.0, 120.0):
            for angle in range(0, 360, 20):
                dx, dy = (distance * unit * f(np.radians(angle)) for f in (np.cos, np.sin))
                left, bottom = x + dx - (dx < 0) * box.width, y + dy - (1 - np.sin(np.radians(angle))) / 2 * box.height
                place = (left, bottom, left + box.width, bottom + box.height)
                if not _within(place, frame.extents) or any(_overlap(place, other) for other in taken):
                    continue
                covered = ((ink > place[:2]) & (ink < place[2:])).all(axis=1).sum()
                best = min(best, (distance / 6 + min(covered, 20) / 3, place, distance), key=lambda found: found[0])
        _, place, distance = best if np.isfinite(best[0]) else (0.0, (x, y, x + box.width, y + box.height), 10.0)
        x0, y0, x1, y1 = place
        taken.append((x0 - 6 * unit, y0 - unit, x1 + 6 * unit, y1 + unit))
        ink = np.concatenate([ink, _along(np.array([(x, y), ((x0 + x1) / 2, (y0 + y1) / 2)]))])
        axes.annotate(
            name, (mark.x.value, mark.y.value), xytext=place[:2], textcoords="figure pixels", zorder=6,
            arrowprops={"arrowstyle": "-", "color": "#999999", "lw": 0.7} if distance > 20 else None,
            path_effects=[withStroke(linewidth=2.5, foreground="white")], **style,
        )  # fmt: skip


def _along(line: np.ndarray) -> np.ndarray:
    """Pixels every few steps along a line through points [N, 2]."""
    parts = [np.linspace(a, b, max(2, int(np.hypot(*(b - a)) / 6))) for a, b in itertools.pairwise(line)]
    return np.concatenate([line, *parts])


def _within(place: tuple[float, ...], frame: Sequence[float] | np.ndarray) -> bool:
    x0, y0, x1, y1 = frame
    return x0 + 4 <= place[0] and y0 + 4 <= place[1] and place[2] <= x1 and place[3] <= y1


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
