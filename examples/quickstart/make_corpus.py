"""Make an English-German corpus of dates, numbers, amounts, units and names, without the network.

The texts are real language data: the Unicode CLDR as Babel ships it. Both sides of a pair are the
same value formatted for two locales ("Thursday, March 4, 2021" / "Donnerstag, 4. März 2021"). The
same version of Babel and the same seed give the same bytes.

No sentence, on either side, occurs in two splits. Single names (a country, a language, a unit) are
all in the training part: what is held out are new combinations of them.

    python make_corpus.py --out DIR [--train 30000 --valid 500 --test 1000 --seed 1]
"""

from __future__ import annotations

import argparse
import datetime
import random
from collections.abc import Callable, Iterator
from pathlib import Path

from babel import Locale
from babel.dates import (
    format_date,
    format_interval,
    format_skeleton,
    format_time,
    format_timedelta,
    get_datetime_format,
)
from babel.lists import format_list
from babel.numbers import (
    format_compact_decimal,
    format_currency,
    format_decimal,
    format_percent,
)
from babel.units import format_compound_unit, format_unit, get_unit_name

LOCALES = ("en", "de")
Pair = tuple[str, str]

EN, DE = (Locale(code) for code in LOCALES)
UNITS = [
    f"{kind}-{unit}"
    for kind, units in {
        "length": "kilometer meter centimeter mile foot inch yard light-year nautical-mile",
        "mass": "kilogram gram tonne pound ounce milligram carat",
        "duration": "year month week day hour minute second millisecond century decade",
        "area": "square-kilometer hectare square-meter acre square-mile",
        "volume": "liter cubic-meter gallon cup pint barrel",
        "speed": "kilometer-per-hour meter-per-second mile-per-hour knot",
        "temperature": "celsius fahrenheit kelvin",
        "energy": "joule kilojoule calorie kilocalorie kilowatt-hour",
        "power": "watt kilowatt megawatt horsepower",
        "digital": "byte kilobyte megabyte gigabyte terabyte bit",
        "angle": "degree arc-minute radian revolution",
        "electric": "volt ampere ohm",
        "pressure": "bar hectopascal millimeter-ofhg",
        "frequency": "hertz kilohertz megahertz",
    }.items()
    for unit in units.split()
    if all(get_unit_name(f"{kind}-{unit}", locale=code) for code in LOCALES)
]
CURRENCIES = (
    "USD EUR GBP JPY CHF CAD AUD NZD CNY INR BRL MXN ZAR SEK NOK DKK PLN CZK HUF RON BGN TRY ILS "
    "EGP KRW THB SGD HKD IDR MYR PHP VND ARS CLP COP PEN UAH RUB ISK NGN KES MAD SAR AED"
).split()


def _names(field: str, keep: Callable[[str], bool]) -> list[Pair]:
    """Names that both locales have, in the order of their codes."""
    english, german = getattr(EN, field), getattr(DE, field)
    return [
        (english[code], german[code])
        for code in sorted(set(english) & set(german))
        if keep(code) and english[code] and german[code]
    ]


TERRITORIES = _names("territories", lambda code: len(code) == 2 and code not in {"ZZ", "XA", "XB"})
LANGUAGES = _names("languages", lambda code: len(code) == 2)


def _both(function: Callable[..., str], *args: object, **kwargs: object) -> Pair:
    english, german = (function(*args, locale=code, **kwargs) for code in LOCALES)
    return english, german


def _listed(parts: list[Pair], style: str = "standard") -> Pair:
    english, german = (
        format_list([part[side] for part in parts], style=style, locale=code)  # type: ignore[arg-type]
        for side, code in enumerate(LOCALES)
    )
    return english, german


def _day(rng: random.Random) -> datetime.date:
    return datetime.date(1900, 1, 1) + datetime.timedelta(days=rng.randrange(56_000))


def _number(rng: random.Random) -> float:
    """Small whole numbers most often, as in text; sometimes large ones or fractions."""
    size = rng.random()
    if size < 0.4:
        return rng.randrange(1, 100)
    if size < 0.7:
        return rng.randrange(100, 10_000)
    return round(rng.uniform(0, 1000), rng.choice((1, 1, 2)))


def date(rng: random.Random) -> Pair:
    """A day, in one of the locale's usual forms."""
    day = _day(rng)
    form = rng.choice(("full", "full", "long", "medium", "yMMMEd", "yMMMM", "MMMMd", "yQQQQ"))
    if form in ("full", "long", "medium"):
        return _both(format_date, day, form)
    return _both(lambda **kw: format_skeleton(form, day, **kw))


def moment(rng: random.Random) -> Pair:
    """A day and the time of it."""
    day = _day(rng)
    clock = datetime.time(rng.randrange(24), rng.choice((0, 15, 30, 45, rng.randrange(60))))
    form = rng.choice(("full", "long", "medium"))

    def text(locale: str) -> str:
        pattern = get_datetime_format(form, locale=locale).replace("'", "")
        return pattern.replace("{1}", format_date(day, form, locale=locale)).replace(
            "{0}", format_time(clock, "short", locale=locale)
        )

    return _both(text)


def interval(rng: random.Random) -> Pair:
    """From one day to another."""
    start = _day(rng)
    end = start + datetime.timedelta(days=rng.choice((1, 3, 10, 40, 200, 800)))
    return _both(format_interval, start, end, rng.choice(("yMMMd", "yMMMEd", "yMMM")))


def number(rng: random.Random) -> Pair:
    """A number, a share, or a round large number in words."""
    form = rng.random()
    if form < 0.35:
        return _both(format_decimal, rng.choice((_number(rng), rng.randrange(10**7))))
    if form < 0.65:
        return _both(format_percent, rng.randrange(10_000) / 1000, decimal_quantization=False)
    value = round(rng.uniform(1, 1000), 1) * 10 ** rng.choice((3, 6, 9, 12))
    return _both(format_compact_decimal, value, format_type="long", fraction_digits=1)


def amount(rng: random.Random) -> Pair:
    """A sum of money, the currency written out."""
    value, currency = _number(rng), rng.choice(CURRENCIES)
    return _both(format_currency, value, currency, format_type="name")


def measure(rng: random.Random) -> Pair:
    """A quantity with its unit, written out."""
    if rng.random() < 0.15:
        unit = rng.choice([u for u in UNITS if u.startswith(("length", "mass", "volume"))])
        per = rng.choice(("duration-hour", "duration-day", "duration-second"))
        value = _number(rng)
        return _both(format_compound_unit, value, unit, denominator_unit=per)
    return _both(format_unit, _number(rng), rng.choice(UNITS))


def relative(rng: random.Random) -> Pair:
    """So long ago, or in so long."""
    days = rng.choice((-1, 1)) * rng.uniform(0.001, 4000)
    delta = datetime.timedelta(days=days)
    return _both(format_timedelta, delta, add_direction=True, threshold=10 ** rng.uniform(0, 3))


def places(rng: random.Random) -> Pair:
    """Countries and regions, with "and" or "or" before the last."""
    style = rng.choice(("standard", "standard", "or"))
    return _listed(rng.sample(TERRITORIES, rng.choice((2, 2, 3, 4))), style)


def languages(rng: random.Random) -> Pair:
    """Languages, with "and" or "or" before the last."""
    style = rng.choice(("standard", "standard", "or"))
    return _listed(rng.sample(LANGUAGES, rng.choice((2, 2, 3))), style)


def variety(rng: random.Random) -> Pair:
    """A language as it is spoken somewhere."""
    language, place = rng.choice(LANGUAGES), rng.choice(TERRITORIES)
    english, german = (f"{language[side]} ({place[side]})" for side in (0, 1))
    return english, german


def several(rng: random.Random) -> Pair:
    """Several quantities or amounts in a row."""
    parts = [rng.choice((amount, measure))(rng) for _ in range(rng.choice((2, 2, 3)))]
    return _listed(parts)


# How many of a hundred pairs each kind gives.
KINDS: dict[Callable[[random.Random], Pair], int] = {
    date: 18,
    moment: 10,
    interval: 8,
    number: 6,
    amount: 14,
    measure: 14,
    relative: 1,
    places: 12,
    languages: 6,
    variety: 5,
    several: 6,
}


def vocabulary() -> Iterator[Pair]:
    """Single names and units: what every combination is made of."""
    yield from TERRITORIES
    yield from LANGUAGES
    for unit in UNITS:
        yield _both(format_unit, 1, unit)
        yield _both(format_unit, 2, unit)
    for currency in CURRENCIES:
        yield _both(format_currency, 1, currency, format_type="name")
        yield _both(format_currency, 2, currency, format_type="name")


def clean(text: str) -> str:
    """One kind of space: the locales also use non-breaking and thin ones."""
    return " ".join(text.split())


def make(train: int, valid: int, test: int, seed: int) -> dict[str, list[Pair]]:
    """The three splits, each in random order."""
    rng = random.Random(seed)
    seen: tuple[set[str], set[str]] = (set(), set())

    def new(pair: Pair) -> Pair | None:
        pair = clean(pair[0]), clean(pair[1])
        if not all(pair) or pair[0] in seen[0] or pair[1] in seen[1]:
            return None
        seen[0].add(pair[0])
        seen[1].add(pair[1])
        return pair

    names = [pair for pair in map(new, vocabulary()) if pair]
    kinds, weights = list(KINDS), list(KINDS.values())
    made: list[Pair] = []
    while len(made) < train + valid + test - len(names):
        pair = new(rng.choices(kinds, weights)[0](rng))
        if pair:
            made.append(pair)
    held_out, rest = made[: valid + test], names + made[valid + test :]
    rng.shuffle(rest)
    return {"train": rest, "valid": held_out[:valid], "test": held_out[valid:]}


def write(splits: dict[str, list[Pair]], out: Path) -> None:
    """Write `{split}.en` and `{split}.de`."""
    out.mkdir(parents=True, exist_ok=True)
    for split, pairs in splits.items():
        for side, language in enumerate(LOCALES):
            text = "".join(pair[side] + "\n" for pair in pairs)
            (out / f"{split}.{language}").write_text(text, encoding="utf-8", newline="\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--train", type=int, default=30_000, help="pairs to train on")
    parser.add_argument("--valid", type=int, default=500, help="pairs to validate on")
    parser.add_argument("--test", type=int, default=1_000, help="pairs to test on")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    write(make(args.train, args.valid, args.test, args.seed), args.out)


if __name__ == "__main__":
    main()
