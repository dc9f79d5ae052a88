"""Tokens by layer, language and expert, and how much language and expert depend on each other."""

import math
from dataclasses import dataclass
from typing import List

UNTAGGED = "no language"  # the name of the row of sentences without a language token


@dataclass(frozen=True)
class LanguageLoad:
    """Tokens by layer, language and expert: counts [L][N][E]. layers, languages: the L and N names."""

    layers: List[str]
    languages: List[str]
    counts: List[List[List[int]]]

    def shares(self) -> List[List[List[float]]]:
        """[L][N][E]: each expert's share of a language's tokens."""
        return [[[count / max(sum(row), 1) for count in row] for row in rows] for rows in self.counts]

    def information(self) -> List[float]:
        """[L]: the mutual information of language and expert in bits; 0 if all languages use the experts equally.

        At most log2 of the number of languages or of experts, whichever is smaller.
        """
        return [mutual_information(rows) for rows in self.counts]

    def divergences(self) -> List[List[float]]:
        """[L][N]: how much a language's use of the experts differs from that of all tokens, in bits.

        It is a Kullback-Leibler divergence. Its mean over languages, weighted by their tokens, is `information`.
        """
        return [[_divergence(row, rows) for row in rows] for rows in self.counts]


def mutual_information(counts: List[List[int]]) -> float:
    """Mutual information of row and column of a table of counts, in bits: sum p(n, e) log2(p(n, e) / (p(n) p(e)))."""
    total = sum(map(sum, counts))
    rows, columns = [sum(row) for row in counts], [sum(column) for column in zip(*counts)]
    return sum(
        count / total * math.log2(count * total / (rows[n] * columns[e]))
        for n, row in enumerate(counts)
        for e, count in enumerate(row)
        if count
    )


def _divergence(row: List[int], rows: List[List[int]]) -> float:
    """sum p(e | n) log2(p(e | n) / p(e)), with row n of a table of counts."""
    own, total, columns = sum(row), sum(map(sum, rows)), [sum(column) for column in zip(*rows)]
    return sum(count / own * math.log2(count / own * total / column) for count, column in zip(row, columns) if count)
