"""--moe-trace and --moe-replay in fairseq-generate, -interactive, -eval-lm and -validate.

In generation, the trace has the source and the best hypothesis of each sentence, as one forward over both routes them. A
replay routes the source by the trace, and those hypotheses of the search that have begun like the traced one; the gates route
the others.
"""

import functools
import importlib
import sys
from contextlib import ExitStack, contextmanager
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple
from unittest.mock import patch

import torch
from fairseq import criterions
from fairseq.sequence_generator import SequenceGenerator
from fairseq.sequence_scorer import SequenceScorer
from torch import Tensor

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.plugin.traces.following import Following
from fairseq_sparsemixer.plugin.traces.options import open_following, wanted

COMMANDS = ("generate", "interactive", "eval_lm", "validate")
_mains: Dict[str, Callable] = {}  # fairseq's own


def _run(command: str, cfg: Any, *arguments: Any, **options: Any) -> Any:
    flags = wanted(cfg)
    if flags is None:
        return _mains[command](cfg, *arguments, **options)
    following = open_following(flags, shard_of(command, cfg))
    following.subset = "interactive" if command == "interactive" else getattr(getattr(cfg, "dataset", cfg), "gen_subset", "test")
    if following.trace is not None:
        following.trace.start()
    with ExitStack() as stack:
        stack.callback(following.detach)
        stack.enter_context(followed_generators(following))
        if command == "validate":
            stack.enter_context(followed_criterion(following))
        if command == "interactive":
            stack.enter_context(numbered_batches(following))
        return _mains[command](cfg, *arguments, **options)


def shard_of(command: str, cfg: Any) -> Tuple[int, int]:
    """(index, number) of the shard of the data, for commands that take one without a process group."""
    distributed, dataset = (getattr(cfg, name, cfg) for name in ("distributed_training", "dataset"))  # or a flat Namespace
    ranks = distributed.distributed_rank, distributed.distributed_world_size
    if command == "generate":
        return ranks
    if command == "eval_lm":
        return max(ranks[0], dataset.shard_id), max(ranks[1], dataset.num_shards)
    return 0, 1


# Named functions, because fairseq sends a command's main to the ranks that it spawns by its module and name.
def generate(cfg: Any, *arguments: Any, **options: Any) -> Any:
    """fairseq_cli.generate.main."""
    return _run("generate", cfg, *arguments, **options)


def interactive(cfg: Any, *arguments: Any, **options: Any) -> Any:
    """fairseq_cli.interactive.main."""
    return _run("interactive", cfg, *arguments, **options)


def eval_lm(cfg: Any, *arguments: Any, **options: Any) -> Any:
    """fairseq_cli.eval_lm.main."""
    return _run("eval_lm", cfg, *arguments, **options)


def validate(cfg: Any, *arguments: Any, **options: Any) -> Any:
    """fairseq_cli.validate.main."""
    return _run("validate", cfg, *arguments, **options)


@contextmanager
def followed_generators(following: Following) -> Iterator[None]:
    """In this context, fairseq's generator and scorer are followed."""
    search, score = SequenceGenerator._generate, SequenceScorer.generate

    @functools.wraps(search)
    def searching(generator: Any, sample: Dict[str, Any], *arguments: Any, **options: Any) -> Any:
        model = _only(generator.model.models, following)
        following.open_batch(_numbered(sample, following))
        with following.recorded(False), _followed_search(generator.model, following) as first_words:
            hypotheses = search(generator, sample, *arguments, **options)
        with following.recorded():
            _read_hypotheses(model, sample, hypotheses, first_words, following)
        following.close_batch()
        return hypotheses

    @functools.wraps(score)
    def scoring(scorer: Any, models: List[Any], sample: Dict[str, Any], **options: Any) -> Any:
        _only(models, following)
        following.open_batch(_numbered(sample, following))
        with following.recorded():
            scores = score(scorer, models, sample, **options)
        following.close_batch()
        return scores

    with patch.object(SequenceGenerator, "_generate", searching), patch.object(SequenceScorer, "generate", scoring):
        yield


def _only(models: List[Any], following: Following) -> Any:
    """The model, followed. Raises ConfigurationError if there are several."""
    if len(models) > 1:
        raise ConfigurationError(f"{following.flag} follows one model, and --path names {len(models)}; give one")
    following.attach(models[0])
    return models[0]


def _numbered(sample: Dict[str, Any], following: Following) -> Dict[str, Any]:
    """The sample; fairseq-interactive's have no numbers."""
    return sample if "id" in sample or following.numbers is None else {**sample, "id": following.numbers}


@contextmanager
def _followed_search(ensemble: Any, following: Following) -> Iterator[List[Tensor]]:
    """In this context, the search of one batch says which hypotheses the decoder sees; the list gets their first words [R]."""
    numbers = following.sentences
    assert numbers is not None
    first_words: List[Tensor] = []
    rows: Optional[Tensor] = None  # [R], the sentence of each hypothesis
    forward_decoder, reorder = ensemble.forward_decoder, ensemble.reorder_incremental_state

    def decoding(tokens: Tensor, *arguments: Any, **options: Any) -> Any:
        nonlocal rows
        if rows is None:
            rows = torch.arange(len(numbers)).repeat_interleave(len(tokens) // max(len(numbers), 1))
            first_words.append(tokens[:, 0])
        following.sentences, following.prefix = [numbers[row] for row in rows.tolist()], tokens
        return forward_decoder(tokens, *arguments, **options)

    def reordering(states: Any, new_order: Tensor) -> Any:
        nonlocal rows
        assert rows is not None
        rows = rows[new_order.cpu()]
        return reorder(states, new_order)

    ensemble.forward_decoder, ensemble.reorder_incremental_state = decoding, reordering
    try:
        yield first_words
    finally:
        del ensemble.forward_decoder, ensemble.reorder_incremental_state
        following.sentences, following.prefix = numbers, None


@torch.no_grad()
def _read_hypotheses(
    model: Any, sample: Dict[str, Any], hypotheses: List[List[Dict[str, Any]]], first_words: List[Tensor], following: Following
) -> None:
    """Trace one forward over the sources and the best hypothesis of each, if they are to be traced."""
    if not following.recording or not first_words:
        return
    first = first_words[0].view(len(hypotheses), -1)[:, 0]  # [B]
    best = [found[0]["tokens"][:-1] if found else first.new_empty(0) for found in hypotheses]
    inputs = [torch.cat([start.view(1), words.to(first)]) for start, words in zip(first, best)]
    words = torch.nn.utils.rnn.pad_sequence(inputs, batch_first=True, padding_value=model.decoder.dictionary.pad())
    if hasattr(model, "encoder"):
        model(**{**sample["net_input"], "prev_output_tokens": words}, features_only=True)
    else:
        model(words, features_only=True)


@contextmanager
def followed_criterion(following: Following) -> Iterator[None]:
    """In this context, a criterion that fairseq builds says which batch the layers see, and its task which subset."""
    build = criterions.build_criterion

    def before(_: Any, arguments: Any) -> None:
        following.attach(arguments[0])
        following.open_batch(arguments[1])
        following.recording = following.trace is not None

    def after(*_: Any) -> None:
        following.recording = False
        following.close_batch()

    @functools.wraps(build)
    def building(cfg: Any, task: Any, *arguments: Any, **options: Any) -> Any:
        criterion = build(cfg, task, *arguments, **options)
        criterion.register_forward_pre_hook(before)
        criterion.register_forward_hook(after)
        load = task.load_dataset

        def load_dataset(split: str, *arguments: Any, **options: Any) -> Any:
            following.subset = split
            return load(split, *arguments, **options)

        task.load_dataset = load_dataset
        return criterion

    with patch.object(criterions, "build_criterion", building):
        yield


@contextmanager
def numbered_batches(following: Following) -> Iterator[None]:
    """In this context, fairseq-interactive's sentences have the numbers of its output, from 0."""
    module = importlib.import_module("fairseq_cli.interactive")
    main = sys.modules.get("__main__")
    modules = [module, *([main] if getattr(main, "make_batches", None) is module.make_batches else [])]
    make, before = module.make_batches, 0

    def make_batches(lines: List[str], *arguments: Any, **options: Any) -> Iterator[Any]:
        nonlocal before
        for batch in make(lines, *arguments, **options):
            following.numbers = torch.as_tensor(batch.ids) + before
            yield batch
        before += len(lines)

    with ExitStack() as stack:
        for each in modules:
            stack.enter_context(patch.object(each, "make_batches", make_batches))
        yield


def install() -> None:
    """Replace the mains, also of a command that was started as `python -m fairseq_cli.generate`."""
    for command in COMMANDS:
        module = importlib.import_module(f"fairseq_cli.{command}")
        if command not in _mains:
            _mains[command] = module.main
            module.main = globals()[command]  # type: ignore[attr-defined]
    started = sys.modules.get("__main__")
    name = getattr(getattr(started, "__spec__", None), "name", "") or ""
    command = name.rsplit(".", 1)[-1]
    if started is not None and name.startswith("fairseq_cli.") and command in COMMANDS:
        if getattr(started, "main", None) is not globals()[command]:
            _mains[command] = started.main  # it uses its own module's names
            started.main = globals()[command]  # type: ignore[attr-defined]
