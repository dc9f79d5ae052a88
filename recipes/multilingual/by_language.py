"""What `evaluate` reports by target language: BLEU and chrF of the translations, and the experts' tokens."""

import json
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any, Dict, List, Optional

from rich.console import Console
from sacrebleu.metrics import BLEU, CHRF

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.files import write_whole
from fairseq_sparsemixer.languages import TAG
from fairseq_sparsemixer.tools.generation import read_sentences
from fairseq_sparsemixer.tools.language_table import LanguageLoad
from fairseq_sparsemixer.tools.tables import cell, markdown_table

COUNTS, PLOT = "language_load.json", "language_load.png"
# sacreBLEU's tokenisers for text without spaces between words; 13a for all others
TOKENISERS = {"zh": "zh", "ja": "char", "km": "char", "my": "char", "th": "char"}
COLUMNS = {"sentences": "{:,}", "bleu": "{:.1f}", "chrf": "{:.1f}", "expert_bits": "{:.3f}"}
NOTE = "expert_bits: how much the language's use of the experts differs from that of all tokens (0: not at all), mean over layers"


def read_languages(source: Path) -> List[str]:
    """The language of each sentence, from its tag. Raises ConfigurationError for a sentence without one."""
    tags = [TAG.match(sentence) for sentence in read_sentences(source)]
    if None in tags:
        raise ConfigurationError(
            f"{source}, line {tags.index(None) + 1} does not begin with a tag such as <2de>; prepare it again"
        )
    return [match.group(1) for match in tags if match]


def scores(
    languages: List[str], hypotheses: List[str], references: List[str], load: Optional[LanguageLoad] = None
) -> Dict[str, Any]:
    """Means over languages, sacreBLEU's signatures, and {"languages": {language: figures}}.

    languages: of each sentence. load: adds the `expert_bits` of LanguageLoad.divergences, mean over layers, and `language_bits`,
    their mean over tokens.
    """
    by_language: Dict[str, Dict[str, Any]] = {}
    signatures: Dict[str, str] = {}
    for language in sorted(set(languages)):
        chosen = [number for number, other in enumerate(languages) if other == language]
        pairs = [hypotheses[number] for number in chosen], [[references[number] for number in chosen]]
        figures: Dict[str, Any] = {"sentences": len(chosen)}
        tokeniser = TOKENISERS.get(language, BLEU.TOKENIZER_DEFAULT)
        for name, metric in (("bleu", BLEU(tokenize=tokeniser)), ("chrf", CHRF())):
            figures[name] = metric.corpus_score(*pairs).score
            signatures[f"{name}_signature" + (f"_{language}" if name == "bleu" and language in TOKENISERS else "")] = str(
                metric.get_signature()
            )
        by_language[language] = figures
    found: Dict[str, Any] = {name: fmean(own[name] for own in by_language.values()) for name in ("bleu", "chrf")}
    if load is not None:
        for column, language in enumerate(load.languages):
            by_language[language]["expert_bits"] = fmean(row[column] for row in load.divergences())
        found["language_bits"] = fmean(load.information())
    return {**found, **signatures, "languages": by_language}


def show(found: Dict[str, Any], console: Console) -> None:
    """Print the table by language."""
    rows = [
        [language, *(cell(form, own.get(name)) for name, form in COLUMNS.items())] for language, own in found["languages"].items()
    ]
    console.print(markdown_table(["language", *COLUMNS], rows), NOTE, sep="\n\n", markup=False, highlight=False, soft_wrap=True)


def count_experts(checkpoint: Path, binary: Path, name: str, folder: Path, console: Console) -> None:
    """Write each layer's tokens by language and expert on the test set to folder/language_load.json, and plot them."""
    from fairseq_sparsemixer.tools.language_load import language_load  # fairseq and matplotlib take seconds to load
    from fairseq_sparsemixer.tools.plotting import plot_language_load

    load = language_load(str(checkpoint), str(binary))
    write_whole(folder / COUNTS, json.dumps(asdict(load)) + "\n")
    plot_language_load({name: load}, folder / PLOT)
    console.print(f"{COUNTS} and {PLOT} are in {folder}", highlight=False)


def read_counts(folder: Path) -> LanguageLoad:
    """What count_experts wrote."""
    return LanguageLoad(**json.loads((folder / COUNTS).read_text(encoding="utf-8")))
