"""A study's results in Markdown: the table of its models, and a section per question."""

from typing import Any, Dict, List

from fairseq_sparsemixer.tools.study.cells import number, spread
from fairseq_sparsemixer.tools.study.comparisons import comparison_section
from fairseq_sparsemixer.tools.study.headroom import headroom_section
from fairseq_sparsemixer.tools.study.translation import translation_section
from fairseq_sparsemixer.tools.study.tuning import tuning_section
from fairseq_sparsemixer.tools.tables import cell, markdown_table

COLUMNS = (
    "router",
    "experts",
    "seeds",
    "valid loss",
    "test",
    "p",
    "seconds",
    "spikes",
    "load max/mean",
)
NOTE = """Mean ± standard deviation over seeds.
`p`: paired bootstrap of BLEU against the baseline, {baseline}, with the same number of experts.
`seconds`: updates times the median time per update, without validation. `spikes`: logged training losses above 1.2 times the
previous one. `load max/mean`: tokens of the busiest expert in any layer over the layer's mean, late in training."""
UNFINISHED = "**Not finished:** {runs}. The figures are of the other runs."
SECTIONS = (comparison_section, translation_section, headroom_section, tuning_section)


def rows(results: Dict[str, Any]) -> List[List[str]]:
    """The cells of the table: a row per group, in the order of COLUMNS."""
    return [
        [
            group["router"],
            cell("{}", group["num_experts"]),
            str(group["seeds"]),
            spread(group["valid_loss"], 3),
            spread(group["test"], 2),
            number(group.get("bleu_p_value"), 3),
            spread(group["train_seconds"], 0),
            spread(group["spikes"], 1),
            spread(group["load_max"], 2),
        ]
        for group in results["groups"]
    ]


def markdown(results: Dict[str, Any]) -> str:
    """The report of a study's results, as `analysed` returns them."""
    parts = [f"## {results['title']}", markdown_table(COLUMNS, rows(results)), NOTE.format(baseline=results["baseline"])]
    unfinished = results.get("unfinished")  # earlier versions did not say
    parts += [UNFINISHED.format(runs=", ".join(unfinished))] if unfinished else []
    parts += [paragraph for section in SECTIONS for paragraph in section(results)]
    return "\n\n".join([*parts, "\n".join(results["machines"])]) + "\n"
