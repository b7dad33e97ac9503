"""A collapse onto one member is said with figures; and group std with a price of cost is said at start."""

import logging
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from rewards.cost import warn_of_group_scale
from routers.tasks.query_routing.guard import STEPS, Collapse, routing_pays

REWARD = np.array([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
FAMILIES = ["a", "a", "a", "b", "b"]


def told(guard: Collapse, *shares: float) -> bool:
    control = SimpleNamespace(should_training_stop=False)
    for step, share in enumerate(shares):
        logs = {"route/share/x": share, "route/share/y": 1 - share, "route/share/none": 0.0}
        guard.on_log(None, SimpleNamespace(global_step=step), control, logs)
    return control.should_training_stop


def test_what_routing_earns_by_hand() -> None:
    # x alone 4/5; x on a and y on b: all five; the best of each query: all five
    assert routing_pays(REWARD, FAMILIES) == pytest.approx((0.8, 1.0, 1.0))
    assert routing_pays(REWARD, [""] * 5) == pytest.approx((0.8, 0.8, 1.0)), "families may be absent"


def test_a_collapse_is_named_with_figures_and_stops_by_key(caplog: Any) -> None:
    assert not told(Collapse(REWARD, FAMILIES, stop=False), *[0.99] * STEPS)
    assert "x takes 99.0% of the routes" in caplog.text and "earns 0.800" in caplog.text and "1.000" in caplog.text
    assert told(Collapse(REWARD, FAMILIES, stop=True), *[0.99] * STEPS)
    caplog.clear()
    assert not told(Collapse(REWARD, FAMILIES, stop=True), *[0.99] * (STEPS - 1), 0.9, *[0.99] * (STEPS - 1))
    assert not told(Collapse(REWARD[:3], FAMILIES[:3], stop=True), *[0.99] * 20), "nothing pays but one member"
    assert not caplog.text


@pytest.mark.parametrize(
    ("scale", "weight", "said"), [("group", 0.2, True), ("group", 0.0, False), ("none", 0.2, False)]
)
def test_group_scale_with_a_price_is_warned_of(scale: str, weight: float, said: bool, caplog: Any) -> None:
    with caplog.at_level(logging.WARNING):
        warn_of_group_scale(scale, weight)
    assert ("collapse to the cheapest member" in caplog.text) == said
