"""fairseq-generate and fairseq-interactive in this process, and independently computed scores of hypotheses."""

import copy
import math
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Iterator, List, Optional, Sequence
from unittest.mock import patch

import torch
from runs import run
from torch import Tensor, nn

EOS, PAD = 2, 1  # in every fairseq dictionary


@dataclass
class Hypothesis:
    """A hypothesis of the generator, with the score per token in bits and the text as printed by fairseq."""

    number: int
    source: Tensor  # [length], without padding
    tokens: Tensor  # [length], including </s>
    score: float
    text: str
    alignment: str


@contextmanager
def _watching(module: Any, seen: List[Any]) -> Iterator[None]:
    """Record inputs and outputs of the task's inference_step while the context is open."""
    setup_task = module.tasks.setup_task

    def watched(*args, **kwargs):
        task = setup_task(*args, **kwargs)
        inference_step = task.inference_step

        def step(generator, models, sample, **options):
            hypotheses = inference_step(generator, models, sample, **options)
            seen.extend(
                (source[source.ne(PAD)], best[0]["tokens"].clone(), float(best[0]["score"]) / math.log(2), task.target_dictionary)
                for source, best in zip(sample["net_input"]["src_tokens"], hypotheses)
            )
            return hypotheses

        task.inference_step = step
        return task

    with patch.object(module.tasks, "setup_task", watched):
        yield


def decode(data: Path, path: Any, results: Path, *flags) -> List[Hypothesis]:
    """Run fairseq-generate on `valid`. Returns the best hypothesis of each sentence, in the order of the data."""
    from fairseq_cli import generate

    from fairseq_sparsemixer import __file__ as package

    seen: List[Any] = []
    with _watching(generate, seen):
        run(
            generate.cli_main, data, "--user-dir", Path(package).parent, "--path", path, "--gen-subset", "valid", "--cpu",
            "--max-len-b", 8, "--results-path", results, "--batch-size", 8, "--required-batch-size-multiple", 1, *flags,
        )  # fmt: skip
    lines = [line.split("\t") for line in (results / "generate-valid.txt").read_text().splitlines()]
    printed = [line for line in lines if line[0].startswith("H-")]
    alignments = [line[1] for line in lines if line[0].startswith("A-")] or [""] * len(printed)
    assert len(printed) == len(seen)
    found = [
        Hypothesis(int(number[2:]), source, tokens, float(score), text, alignment)
        for (number, score, text), (source, tokens, *_), alignment in zip(printed, seen, alignments)
    ]
    return sorted(found, key=lambda hypothesis: hypothesis.number)


def interact(data: Path, path: Any, text: Path, *flags) -> List[Hypothesis]:
    """Run fairseq-interactive on a file. Returns the best hypothesis of each line; score and text are from the generator."""
    from fairseq_cli import interactive

    from fairseq_sparsemixer import __file__ as package

    seen: List[Any] = []
    with _watching(interactive, seen):
        run(
            interactive.cli_main, data, "--user-dir", Path(package).parent, "--path", path, "--input", text, "--cpu",
            "--max-len-b", 12, *flags,
        )  # fmt: skip
    return [
        Hypothesis(number, source, tokens, score, words.string(tokens), "")
        for number, (source, tokens, score, words) in enumerate(seen)
    ]


def log_probabilities(model: nn.Module, source: Optional[Tensor], tokens: Tensor, first: int = EOS) -> Tensor:
    """log p(word | source, preceding tokens), [length, words], in float64; `first` precedes the tokens.

    source: None for a language model.
    """
    model = copy.deepcopy(model).double().eval()
    given = torch.cat([tokens.new_tensor([first]), tokens[:-1]]).unsqueeze(0)
    with torch.no_grad():
        if source is None:
            logits = model(given)[0]
        else:
            logits = model(source.unsqueeze(0), torch.tensor([len(source)]), given)[0]
    return logits.log_softmax(-1)[0]


def bits_per_token(chances: Tensor, tokens: Tensor) -> float:
    """The score that fairseq prints for a hypothesis: mean log2 p per token, from log-probabilities [length, words]."""
    return chances.gather(-1, tokens.unsqueeze(-1)).mean().item() / math.log(2)


def check_scores(hypotheses: Sequence[Hypothesis], chances: Callable[[Tensor, Tensor], Tensor], tolerance: float = 2e-5) -> None:
    """Assert that each printed score follows from the log-probabilities chances(source, tokens)."""
    assert hypotheses
    for hypothesis in hypotheses:
        expected = bits_per_token(chances(hypothesis.source, hypothesis.tokens), hypothesis.tokens)
        assert abs(hypothesis.score - expected) <= tolerance * abs(expected), (hypothesis.score, expected)
