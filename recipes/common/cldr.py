"""An English-German corpus made offline from Unicode CLDR, as the Babel library carries it.

A sentence is one to three items joined by CLDR's list patterns ("A, B, and C" / "A, B und C"; "A or B" / "A oder B").
An item is a date, a time, a duration, a number with a unit, an amount of money, a territory or a language, drawn once
and written by both locales: word order, number formats, plural forms and the 24-hour clock differ between them.
"""

import datetime
import random
from typing import Callable, Dict, List, Literal, Tuple

from fairseq_sparsemixer.errors import ConfigurationError
from recipes.common.corpus import Corpus, Pair

try:
    from babel import Locale
    from babel.dates import format_date, format_datetime, format_time
    from babel.lists import format_list
    from babel.numbers import format_currency, format_percent
    from babel.units import format_unit
except ModuleNotFoundError:
    sentence = "the text of the quickstart is made with the library Babel; pip install -r recipes/requirements.txt"
    raise ConfigurationError(sentence) from None

SOURCE, TARGET = Locale("en"), Locale("de")
MEASURES = (
    "length-meter length-kilometer length-centimeter length-mile length-foot mass-gram mass-kilogram mass-tonne mass-pound"
    " volume-liter volume-milliliter volume-cubic-meter area-hectare area-square-meter area-square-kilometer"
    " speed-kilometer-per-hour speed-meter-per-second temperature-celsius temperature-fahrenheit energy-joule"
    " energy-kilowatt-hour power-watt power-kilowatt pressure-hectopascal digital-byte digital-megabyte digital-gigabyte"
    " angle-degree frequency-hertz electric-volt electric-ampere"
).split()
DURATIONS = ("second", "minute", "hour", "day", "week", "month", "year")
CURRENCIES = "USD EUR GBP JPY CHF SEK NOK DKK PLN CZK HUF RUB TRY INR CNY KRW BRL MXN CAD AUD NZD ZAR EGP ILS THB".split()
LIST_STYLES: Tuple[Literal["standard", "or"], ...] = ("standard", "standard", "or")

Writer = Callable[[Locale], str]  # writes one drawn item in the language of a locale


def _date(rng: random.Random) -> Writer:
    day = datetime.date(1950, 1, 1) + datetime.timedelta(days=rng.randrange(365 * 80))
    style = rng.choice(("full", "long", "medium"))
    return lambda locale: format_date(day, style, locale)


def _time(rng: random.Random) -> Writer:
    time = datetime.time(rng.randrange(24), rng.randrange(60))
    return lambda locale: format_time(time, "short", locale=locale)


def _date_and_time(rng: random.Random) -> Writer:
    moment = datetime.datetime(1950, 1, 1) + datetime.timedelta(minutes=rng.randrange(365 * 80 * 24 * 60))
    style = rng.choice(("long", "medium"))
    return lambda locale: format_datetime(moment, style, tzinfo=None, locale=locale).replace(" UTC", "")


def _number(rng: random.Random) -> float:
    """Small numbers are the likelier ones; one in three has a decimal."""
    value = int(10 ** rng.uniform(0, 4))
    return value if rng.random() < 2 / 3 else value + rng.randrange(1, 10) / 10


def _measure(rng: random.Random) -> Writer:
    value, unit = _number(rng), rng.choice(MEASURES)
    length: Literal["long", "short"] = rng.choice(("long", "long", "short"))
    return lambda locale: format_unit(value, unit, length, locale=locale)


def _duration(rng: random.Random) -> Writer:
    parts = [(rng.randrange(1, 60), unit) for unit in sorted(rng.sample(DURATIONS, rng.choice((1, 2))), key=DURATIONS.index)]

    def write(locale: Locale) -> str:
        words = [format_unit(value, f"duration-{unit}", "long", locale=locale) for value, unit in reversed(parts)]
        return format_list(words, "unit", locale)

    return write


def _money(rng: random.Random) -> Writer:
    value, currency = _number(rng), rng.choice(CURRENCIES)
    style: Literal["name", "standard"] = rng.choice(("name", "name", "standard"))
    return lambda locale: format_currency(value, currency, locale=locale, format_type=style)


def _percent(rng: random.Random) -> Writer:
    value = rng.randrange(1, 1000) / 1000
    return lambda locale: format_percent(value, locale=locale, decimal_quantization=False)


def _names(table: str) -> List[str]:
    """The keys of a table of CLDR that both locales name: territories by ISO code, languages by BCP 47 code."""
    source, target = getattr(SOURCE, table), getattr(TARGET, table)
    return sorted(key for key in source if key in target and not key.isdigit())


NAMES = {table: _names(table) for table in ("territories", "languages")}


def _name(rng: random.Random) -> Writer:
    table = rng.choice(sorted(NAMES))
    code = rng.choice(NAMES[table])
    return lambda locale: getattr(locale, table)[code]


ITEMS = (_date, _date_and_time, _time, _duration, _measure, _money, _percent, _name, _name)


def _sentence(rng: random.Random) -> Pair:
    writers = [rng.choice(ITEMS)(rng) for _ in range(rng.choice((1, 2, 2, 3)))]
    style = rng.choice(LIST_STYLES)
    return Pair(*(_one_line(format_list([write(locale) for write in writers], style, locale)) for locale in (SOURCE, TARGET)))


def _one_line(text: str) -> str:
    """CLDR's narrow and no-break spaces as plain ones."""
    return " ".join(text.split())


def make_cldr(sizes: Dict[str, int], seed: int) -> Corpus:
    """sizes by split -> distinct pairs by split, the same for the same seed and version of CLDR.

    No English and no German sentence occurs twice in the whole corpus, so that splits share no sentence of either side.
    The bare names of territories and languages, whose translation nothing but having seen it can tell, go to the first split.
    """
    rng = random.Random(seed)
    seen: Tuple[set, set] = (set(), set())
    corpus: Corpus = {split: [] for split in sizes}

    def add(split: str, pair: Pair) -> None:
        if pair.source not in seen[0] and pair.target not in seen[1]:
            seen[0].add(pair.source)
            seen[1].add(pair.target)
            corpus[split].append(pair)

    for table, codes in NAMES.items():
        for code in codes:
            add(next(iter(sizes)), Pair(*(_one_line(getattr(locale, table)[code]) for locale in (SOURCE, TARGET))))
    for split, size in sizes.items():
        while len(corpus[split]) < size:
            add(split, _sentence(rng))
        rng.shuffle(corpus[split])
    return corpus
