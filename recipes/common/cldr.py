"""Translation corpora made offline from Unicode CLDR, as the Babel library carries it: English into one or many languages.

A sentence is one to three items joined by CLDR's list patterns ("A, B, and C" / "A, B und C"; "A or B" / "A oder B").
An item is a date, a time, a duration, a number with a unit, an amount of money, a territory or a language, drawn once
and written by both locales: word order, number formats, plural forms and the 24-hour clock differ between them. With
several target languages, a tag such as `<2de>` in front of the English sentence says which one is wanted.
"""

import datetime
import random
from itertools import cycle
from typing import Callable, Dict, List, Literal, Sequence, Set, Tuple

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

SOURCE = Locale("en")
GERMAN = ("de",)
MANY = tuple("de fr es it pl ru tr fi hu el cs sv pt nl ro uk".split())  # four families and three scripts
TABLES = ("territories", "languages")
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
        return _unit_list(words, locale)

    return write


def _unit_list(words: List[str], locale: Locale) -> str:
    try:
        return format_list(words, "unit", locale)
    except KeyError:  # Babel carries the pattern in part for some languages, such as Spanish
        return format_list(words, "standard", locale)


def _money(rng: random.Random) -> Writer:
    value, currency = _number(rng), rng.choice(CURRENCIES)
    style: Literal["name", "standard"] = rng.choice(("name", "name", "standard"))
    return lambda locale: format_currency(value, currency, locale=locale, format_type=style)


def _percent(rng: random.Random) -> Writer:
    value = rng.randrange(1, 1000) / 1000
    return lambda locale: format_percent(value, locale=locale, decimal_quantization=False)


def shared_names(targets: Sequence[str]) -> Dict[str, List[str]]:
    """By table of CLDR, the keys that English and all targets name: territories by ISO code, languages by BCP 47 code."""
    named = {table: [getattr(locale, table) for locale in map(Locale, targets)] for table in TABLES}
    return {
        table: sorted(key for key in getattr(SOURCE, table) if not key.isdigit() and all(key in names for names in named[table]))
        for table in TABLES
    }


def _name(rng: random.Random, names: Dict[str, List[str]]) -> Writer:
    table = rng.choice(sorted(names))
    code = rng.choice(names[table])
    return lambda locale: getattr(locale, table)[code]


ITEMS = (_date, _date_and_time, _time, _duration, _measure, _money, _percent)


def _sentence(rng: random.Random, names: Dict[str, List[str]]) -> Writer:
    def item() -> Writer:
        draw = rng.choice((*ITEMS, None, None))  # names are two ninths of all items
        return _name(rng, names) if draw is None else draw(rng)

    writers = [item() for _ in range(rng.choice((1, 2, 2, 3)))]
    style = rng.choice(LIST_STYLES)
    return lambda locale: format_list([write(locale) for write in writers], style, locale)


def _one_line(text: str) -> str:
    """CLDR's narrow and no-break spaces as plain ones."""
    return " ".join(text.split())


def tag(language: str) -> str:
    """The token in front of a source sentence that asks for a target language."""
    return f"<2{language}>"


def make_cldr(sizes: Dict[str, int], seed: int, targets: Sequence[str] = GERMAN) -> Corpus:
    """sizes by split -> distinct pairs by split, the same for the same seed, targets and version of CLDR.

    Targets take turns, so that each has its share of every split. No English sentence occurs twice in the whole corpus, and
    no sentence of a target language does, so that splits share no sentence of either side. An exception: the bare names of
    territories and languages, which can only be learnt by heart, are in the first split once for each target.
    """
    rng = random.Random(seed)
    names = shared_names(targets)
    seen: Set[Tuple[str, str]] = set()  # language, sentence
    corpus: Corpus = {split: [] for split in sizes}

    def add(split: str, write: Writer, target: str, may_share_source: bool = False) -> bool:
        source, translation = _one_line(write(SOURCE)), _one_line(write(Locale(target)))
        if (target, translation) in seen or (("en", source) in seen and not may_share_source):
            return False
        seen.update({("en", source), (target, translation)})
        corpus[split].append(Pair(f"{tag(target)} {source}" if len(targets) > 1 else source, translation))
        return True

    for target in targets:
        for table, codes in names.items():
            for code in codes:
                add(next(iter(sizes)), lambda locale: getattr(locale, table)[code], target, may_share_source=target != targets[0])
    for split, size in sizes.items():
        turns = cycle(targets)
        target = next(turns)
        while len(corpus[split]) < size:
            if add(split, _sentence(rng, names), target):
                target = next(turns)
        rng.shuffle(corpus[split])
    return corpus
