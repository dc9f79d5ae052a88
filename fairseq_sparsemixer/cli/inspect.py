"""Show a checkpoint's experts, parameters (total and active), FLOPs per token, and the similarity of its experts.

Only the file is needed. With --text, the model also runs on sentences, and the load of each expert is shown; a translation
model also needs their translations, --target. With --trace FILE in place of a checkpoint: which words go to which expert.

examples:
  fairseq-sparsemixer inspect checkpoint_best.pt
  fairseq-sparsemixer inspect lm/checkpoint_best.pt --text valid.tokens
  fairseq-sparsemixer inspect checkpoint_best.pt --text val.bpe.en --target val.bpe.de --json report.json
  fairseq-sparsemixer inspect --trace trace.jsonl --words 20 --json words.json
"""

import argparse
import sys
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from fairseq_sparsemixer.cli.json_file import require_json, write_json
from fairseq_sparsemixer.cli.unused import refuse_unused
from fairseq_sparsemixer.errors import ConfigurationError

SENTENCES = 200
WORDS, MIN_COUNT = 10, 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The checkpoint, and text to run it on."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT", nargs="?", help="a fairseq checkpoint")
    parser.add_argument("--text", metavar="FILE", help="sentences, in the model's subwords")
    parser.add_argument("--target", metavar="FILE", help="for a translation model: their translations, one per line")
    parser.add_argument("--data-bin", metavar="DIR", help="folder of the dictionaries (default: as in training)")
    parser.add_argument(
        "--sentences", type=int, metavar="N", help=f"with --text: run the first N sentences (default: {SENTENCES})"
    )
    parser.add_argument("--trace", metavar="FILE", help="a file of fairseq's --moe-trace, in place of a checkpoint")
    parser.add_argument("--words", type=int, metavar="N", help=f"with --trace: words for each expert (default: {WORDS})")
    parser.add_argument(
        "--min-count",
        type=int,
        metavar="N",
        help=f"with --trace: tokens in a layer from which a word has a share (default: {MIN_COUNT})",
    )
    parser.add_argument("--json", metavar="FILE", help="also write all figures to this file")


def run(options: argparse.Namespace) -> None:
    """Inspect, print, write. Raises ConfigurationError for unusable flags and files."""
    if options.trace is not None:
        inspect_trace(options)
        return
    if options.checkpoint is None:
        raise ConfigurationError("inspect needs a file; give a checkpoint, or --trace FILE")
    from fairseq_sparsemixer.plugin.checkpoints.reading import one_sentence_for  # needs fairseq
    from fairseq_sparsemixer.tools.inspection import inspect_checkpoint

    for name in ("text", "target", "data_bin"):
        if getattr(options, name) == "":
            raise ConfigurationError(f"--{name.replace('_', '-')} '' is empty; give a path, or leave it out")
    if options.target and not options.text:
        raise ConfigurationError(f"--target {options.target} needs its source sentences; give --text FILE")
    if not options.text:
        refuse_unused(options, "sentences data_bin", "is only for --text")
    refuse_unused(options, "words min_count", "is only for --trace")
    options.sentences = SENTENCES if options.sentences is None else options.sentences
    if options.sentences < 1:
        raise ConfigurationError(f"--sentences {options.sentences} must be at least 1")
    require_json(options.json, [options.checkpoint, *filter(None, (options.text, options.target))])
    with one_sentence_for(options.checkpoint):
        report = inspect_checkpoint(options.checkpoint)
    load = measure_load(options) if options.text else None
    console = Console()
    print_report(report, load, console)
    if options.json:
        write_json(options.json, {"checkpoint": options.checkpoint, **asdict(report), "load": load})


def inspect_trace(options: argparse.Namespace) -> None:
    """Report on --trace, print, write. Raises ConfigurationError for unusable flags and files."""
    from fairseq_sparsemixer.tools.trace_report import report_trace

    if options.trace == "":
        raise ConfigurationError("--trace '' is empty; give a path, or leave it out")
    for flag, value in (("CHECKPOINT", options.checkpoint), ("--text", options.text), ("--target", options.target)):
        if value is not None:
            raise ConfigurationError(f"{flag} {value} does not go with --trace {options.trace}; inspect one of them at a time")
    refuse_unused(options, "data_bin sentences", f"does not go with --trace {options.trace}")
    words = WORDS if options.words is None else options.words
    min_count = MIN_COUNT if options.min_count is None else options.min_count
    for flag, value in (("--words", words), ("--min-count", min_count)):
        if value < 1:
            raise ConfigurationError(f"{flag} {value} must be at least 1")
    require_json(options.json, [options.trace])
    report = report_trace(options.trace, words, min_count)
    console = Console()
    for layer in report:
        print_words(layer, min_count, console)
    if options.json:
        write_json(options.json, {"trace": options.trace, "layers": [asdict(layer) for layer in report]})


def print_words(layer: Any, min_count: int, console: Console) -> None:
    """Print a line for each expert of a layer."""
    console.print(f"{layer.layer}: {layer.tokens:,} tokens of {layer.words:,} words", highlight=False)
    by_share = f"largest share (words of {min_count} tokens or more)"
    table = Table("expert", "% of tokens", "weight", "most tokens", by_share, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for expert in layer.experts:
        most = " ".join(f"{word.word} ({word.count:,})" for word in expert.by_count)
        purest = " ".join(f"{word.word} ({100 * word.share:.0f}%)" for word in expert.by_share)
        cells = (f"{expert.expert}", f"{100 * expert.share:.1f}", f"{expert.weight:.3f}", most, purest)
        table.add_row(*map(escape, cells))
    console.print(table)


def measure_load(options: argparse.Namespace) -> Dict[str, List[float]]:
    """Tokens per expert at inference, by layer, over the first sentences, with their targets as input if there are any."""
    import torch

    from fairseq_sparsemixer.moe.layer import named_moe_layers
    from fairseq_sparsemixer.tools.sentences import load_model

    model, _, task = load_model(options.checkpoint, options.data_bin)
    layers = named_moe_layers(model)
    load = {name: torch.zeros(layer.gate.num_experts) for name, layer in layers}
    with torch.no_grad():
        for inputs in islice(model_inputs(options, model, task), min(options.sentences, sys.maxsize)):
            model(**inputs)
            for name, layer in layers:
                assert layer.routing is not None
                load[name] += layer.routing.statistics()["load"].sum(0).float()
    return {name: tokens.tolist() for name, tokens in load.items()}


def model_inputs(options: argparse.Namespace, model: Any, task: Any) -> Iterator[Dict[str, Any]]:
    """The arguments of the model's forward, one sentence at a time. Raises ConfigurationError for the wrong files."""
    from fairseq_sparsemixer.tools.generation import read_sentences
    from fairseq_sparsemixer.tools.sentences import make_sample, read_pairs, translates

    if translates(model):
        if not options.target:
            raise ConfigurationError(f"{options.checkpoint} is a translation model; give --target FILE beside --text")
        return (make_sample(task, *pair)["net_input"] for pair in read_pairs(options.text, options.target))
    if options.target:
        raise ConfigurationError(f"--target {options.target} is for translation models, and {options.checkpoint} is not one")
    lines = [line for line in read_sentences(Path(options.text)) if line.strip()]
    if not lines:
        raise ConfigurationError(f"--text {options.text} has no sentences; give another file")
    return (text_input(model, task, line) for line in lines)


def text_input(model: Any, task: Any, line: str) -> Dict[str, Any]:
    """A sentence as in fairseq's tasks: for a language model, after an end of sentence; for a masked one, between its marks."""
    words = task.source_dictionary
    tokens = words.encode_line(line, add_if_not_exist=False).long().unsqueeze(0)  # [1, T]
    if hasattr(model, "decoder"):
        return {"src_tokens": tokens.roll(1, dims=1)[:, : model.max_positions()]}
    tokens = tokens.new_tensor([[words.bos(), *tokens[0].tolist()]])
    return {"src_tokens": tokens[:, : model.max_positions()], "features_only": True}


def print_report(report, load: Optional[Dict[str, List[float]]], console: Console) -> None:
    """Print the totals, and a line per layer."""
    updates = "" if report.updates is None else f", {report.updates:,} updates"
    experts = f"router {report.router}, k = {report.top_k:g}" if report.layers else "no experts"
    console.print(f"{experts}{updates}", highlight=False)
    console.print(f"parameters: {report.parameters:,}, active per token: {report.active:,}", highlight=False)
    parts = Table("", "parameters", "active per token", "forward FLOPs per token", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name, part in report.parts.items():
        parts.add_row(name, f"{part.parameters:,}", f"{part.active:,}", f"{part.flops:,}")
    console.print(parts)
    if not report.layers:
        return
    columns = ["experts", "M", "H", "parameters", "router cosine", "expert cosine"]
    layer_name = Column("layer", overflow="fold")  # truncated, all names of layers would be the same
    table = Table(layer_name, *columns, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for layer in report.layers:
        cells = [layer.name, f"{layer.num_experts}", f"{layer.model_dim}", f"{layer.hidden_dim}", f"{layer.parameters:,}"]
        cells += ["-" if value is None else f"{value:.3f}" for value in (layer.router_similarity, layer.expert_similarity)]
        table.add_row(*cells)
    console.print(table)
    for name, tokens in (load or {}).items():
        shares = " ".join(f"{100 * count / max(sum(tokens), 1):.1f}" for count in tokens)
        console.print(f"load of {name}, % of {sum(tokens):,.0f} routed tokens by expert: {shares}", highlight=False)
