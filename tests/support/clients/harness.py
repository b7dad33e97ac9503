"""Runs one client's features against a served router, and prints what came of each as JSON. No package of ours."""

import asyncio
import json
import sys
import traceback
from collections.abc import Callable

ADDRESS = sys.argv[1] if len(sys.argv) > 1 else ""
"""Of the API: http://host:port/v1"""
CAPITAL, WEATHER, PEOPLE, SLOW = "capital of Peru?", "weather in Lima and Quito?", "how many people?", "tell it slowly"
KEY = "sk-of-nobody"


def check(found: object, wanted: object) -> None:
    if found != wanted:
        raise AssertionError(f"{found!r} is not {wanted!r}")


def get_weather(city: str) -> str:
    """The weather in a city.

    Args:
        city: its name.
    """
    return f"sunny in {city}"


def run(features: dict[str, Callable[[], object]]) -> None:
    told = {}
    with asyncio.Runner() as one_loop:  # some clients keep connections for all that follows
        for name, feature in features.items():
            try:
                result = feature()
                if asyncio.iscoroutine(result):
                    one_loop.run(asyncio.wait_for(result, 60))
                told[name] = "ok"
            except BaseException as error:
                traceback.print_exc()
                told[name] = f"{type(error).__name__}: {error}"[:500]
    print("\n" + json.dumps(told))
