"""fairseq-train end to end, dense and with experts: words per second, and where the time of a training step goes.

example: python -m benchmarks.train --architecture iwslt --experts 8
The text is random words, unless --data gives a folder made by fairseq-preprocess.
"""

import argparse
import random
import sys
import tempfile
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any, Callable, Dict, List, Optional, Sequence
from unittest import mock

import torch
from torch.profiler import profile, record_function

import fairseq_sparsemixer
from benchmarks import measuring
from fairseq_sparsemixer.moe.layer import MoELayer
from fairseq_sparsemixer.tools.programs import run
from fairseq_sparsemixer.tools.runs import TRAIN_LOG, read_run
from fairseq_sparsemixer.tools.tables import markdown_table

STAGES = ("gate", "auxiliary loss", "dispatch", "experts", "combine")


def write_random_text(folder: Path, sentences: int, words: int) -> Path:
    """Make random parallel text and binarise it with fairseq-preprocess. Returns the binarised folder."""
    source = random.Random(1)
    for language in ("a", "b"):
        lines = (" ".join(f"w{source.randrange(words)}" for _ in range(source.randint(10, 40))) for _ in range(sentences))
        (folder / f"text.{language}").write_text("\n".join(lines) + "\n", encoding="utf-8")
    data = folder / "data"
    command = ["-m", "fairseq_cli.preprocess", "--source-lang", "a", "--target-lang", "b", "--trainpref", folder / "text"]
    command += ["--validpref", folder / "text", "--joined-dictionary", "--destdir", data]
    run([sys.executable, *map(str, command)], folder / "preprocess.txt")
    return data


def train(data: Path, router: str, options: argparse.Namespace, folder: Path) -> float:
    """Words per second of one run of fairseq-train: the median over its updates."""
    log = folder / router / TRAIN_LOG
    log.parent.mkdir(exist_ok=True)
    log.unlink(missing_ok=True)
    program = "from fairseq_cli.train import cli_main; cli_main()"
    command = [sys.executable, "-c", program, data, "--user-dir", Path(fairseq_sparsemixer.__file__).parent]
    command += ["--arch", f"transformer_moe_{options.architecture}", "--router", router, "--num-experts", options.experts]
    command += ["--criterion", "moe_label_smoothed_cross_entropy", "--optimizer", "adam", "--lr", "1e-4"]
    command += ["--max-tokens", options.tokens, "--max-update", options.updates, "--log-interval", 1, "--log-format", "json"]
    command += ["--log-file", log, "--no-save", "--disable-validation"] + ([] if torch.cuda.is_available() else ["--cpu"])
    run([str(part) for part in command], log.with_name("output.txt"))
    return read_run(log.parent).words_per_second


def stage_shares(step: Callable[[], Any], layers: List[MoELayer], repetitions: int = 3) -> Dict[str, float]:
    """The share of each stage of these layers, and of the rest, in the time of `step` (forward and backward), by profiling.

    A backward operation counts for the stage of the forward operation with the same sequence number.
    """
    with ExitStack() as stack:
        _name_stages(stack, layers)
        step()
        with profile() as profiler:
            for _ in range(repetitions):
                step()
    events = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CPU]
    seconds: Dict[str, float] = defaultdict(float)
    stage_of_sequence: Dict[int, str] = {}
    for event in events:
        if event.name.startswith("autograd::engine"):
            continue
        stage = _stage(event)
        if stage is not None:
            seconds[stage] += event.self_cpu_time_total
            if event.sequence_nr >= 0:
                stage_of_sequence.setdefault(event.sequence_nr, stage)
    total = sum(event.cpu_time_total for event in events if event.cpu_parent is None)
    for event in events:
        if event.name.startswith("autograd::engine") and event.sequence_nr in stage_of_sequence:
            seconds[stage_of_sequence[event.sequence_nr]] += event.cpu_time_total
    shares = {stage: seconds[stage] / total for stage in STAGES}
    return {**shares, "rest": 1 - sum(shares.values())}


def _stage(event: Any) -> Optional[str]:
    """The innermost stage around an event."""
    while event is not None:
        if event.name in STAGES:
            return event.name
        event = event.cpu_parent
    return None


def _name_stages(stack: ExitStack, layers: List[MoELayer]) -> None:
    """Make the stages visible to the profiler by name, until the stack closes."""
    targets = [("fairseq_sparsemixer.moe.dispatch.local", name, "dispatch") for name in ("sort_pairs", "order_pairs", "gather")]
    targets.append(("fairseq_sparsemixer.moe.dispatch.local", "combine", "combine"))
    for module in {type(layer.gate).__module__ for layer in layers}:
        targets += [(module, name, "auxiliary loss") for name in ("balance_loss", "router_z_loss")]
    for module, name, stage in targets:
        if hasattr(sys.modules[module], name):
            stack.enter_context(mock.patch(f"{module}.{name}", _named(stage, getattr(sys.modules[module], name))))
    for layer in layers:
        for part, stage in ((layer.gate, "gate"), (layer.experts, "experts")):
            stack.enter_context(mock.patch.object(part, "forward", _named(stage, part.forward)))


def _named(stage: str, function: Callable) -> Callable:
    def recorded(*args, **kwargs):
        with record_function(stage):
            return function(*args, **kwargs)

    return recorded


def shares_of_model(options: argparse.Namespace) -> Dict[str, float]:
    """stage_shares for the model trained by `train`, on one batch of random words."""
    from fairseq_sparsemixer.criterions.moe_cross_entropy import MoECrossEntropyCriterion, MoECrossEntropyCriterionConfig

    from benchmarks import models

    task = models.translation_task(options.words)
    model = models.build_model(task, options.architecture, options.router, options.experts)
    criterion = MoECrossEntropyCriterion.build_criterion(MoECrossEntropyCriterionConfig(sentence_avg=False), task)
    sample = models.random_batch(task, max(options.tokens // 25, 1), 25)

    def step():
        model.zero_grad(set_to_none=True)
        criterion(model, sample)[0].backward()

    return stage_shares(step, [layer for layer in model.modules() if isinstance(layer, MoELayer)])


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="binarised parallel text (default: random words)")
    parser.add_argument("--architecture", default="iwslt", help="size of transformer_moe")
    parser.add_argument("--router", default="sparsemixer")
    parser.add_argument("--experts", type=int, default=8, help="number of experts E")
    parser.add_argument("--tokens", type=int, default=2048, help="--max-tokens of fairseq-train")
    parser.add_argument("--updates", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2, help="runs of each model, alternating")
    parser.add_argument("--words", type=int, default=10000, help="dictionary size of the random text")
    parser.add_argument("--out", type=Path, help="folder for train.json")
    return parser


def main(arguments: Optional[Sequence[str]] = None) -> None:
    options = build_parser().parse_args(arguments)
    speeds: Dict[str, List[float]] = {"dense": [], options.router: []}
    with tempfile.TemporaryDirectory() as name:
        data = options.data or write_random_text(Path(name), sentences=4000, words=options.words)
        for _ in range(options.rounds):
            for router in speeds:
                speeds[router].append(train(data, router, options, Path(name)))
    shares = shares_of_model(options)
    words = {router: round(median(values)) for router, values in speeds.items()}
    result = {
        "words_a_second": words,
        "runs": speeds,
        "slower_than_dense": round(words["dense"] / words[options.router], 3),
        "shares": {stage: round(share, 4) for stage, share in shares.items()},
    }
    print(markdown_table(["model", "words/s"], list(words.items())))
    rows = [[stage, f"{share:.1%}"] for stage, share in shares.items()]
    print(markdown_table(["stage", "share of forward and backward"], rows))
    if options.out:
        measuring.write_json(options.out / "train.json", result)


if __name__ == "__main__":
    main()
