"""fairseq-train logs the same metrics on two ranks as on one process with the union of their batches.

Five updates with a validation after each. The last validation batch leaves the second rank with a dummy batch. ELECTRA,
and sentence prediction with each of GLUE's scores.
"""

from pathlib import Path
from typing import Any, Collection, Dict, List
from unittest.mock import patch

import pytest
from fairseq.data import Dictionary
from ranks import meeting_place, rank_number, run_ranks
from runs import run

from fairseq_sparsemixer.cli.launch import rank_command
from fairseq_sparsemixer.plugin.models import electra_moe
from fairseq_sparsemixer.plugin.trainer import MoETrainer
from fairseq_sparsemixer.tools.glue import TASKS, prepare

pytestmark = pytest.mark.distributed

USER_DIR = Path(electra_moe.__file__).parents[2]
UPDATES = 5
FLAGS = (
    "--num-experts 4 --router switch --jitter-eps 0 --balance-scope global --dropout 0 --attention-dropout 0"
    f" --optimizer adam --lr 0.003 --max-update {UPDATES} --seed 1 --num-workers 0 --no-save --log-format none"
    " --log-interval 1 --required-batch-size-multiple 1"
).split()
ELECTRA = "--task masked_lm --arch electra_moe_tiny --criterion electra --sample-break-mode eos --tokens-per-sample 16".split()
SENTENCES = (
    "--task sentence_prediction --arch roberta_moe_tiny --criterion moe_sentence_prediction --init-token 0"
    " --separator-token 2 --max-positions 32"
).split()
CLOCKS = {"wps", "ups", "wall", "train_wall"}
BY_SENTENCE = {"moe_z_loss"}  # a mean over tokens that is weighted by sentences, so it differs for the union of batches
TRAIN, VALID = 8, 20  # examples; batches of 8 and 8, 8, 4 on one process, of 4 and 4, 4, 4, 4, 4 on two


def words(number: int) -> str:
    """3 to 9 words, then three that differ between odd and even numbers."""
    some = " ".join(f"w{(7 * number + 3 * place * place) % 18}" for place in range(3 + 5 * number % 7))
    return some + f" w{18 + number % 2}" * 3


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """data(name) -> the binarised GLUE task of that name."""
    folder, dictionary = tmp_path_factory.mktemp("glue"), Dictionary()
    for index in range(20):
        dictionary.add_symbol(f"w{index}")

    def make(name: str) -> Path:
        task = TASKS[name]
        raw, columns = folder / name / "raw", task.columns or (*task.inputs, task.label)
        raw.mkdir(parents=True, exist_ok=True)
        for stem, count in (("train", TRAIN), ("dev", VALID)):
            lines = [] if task.columns else ["\t".join(columns)]
            for number in range(count):
                label = task.classes[number % 2] if task.classes else str(number % 2 * 3 + number % 5 / 4)
                row = {**dict.fromkeys(columns, "-"), **dict.fromkeys(task.inputs, words(number)), task.label: label}
                lines.append("\t".join(row[column] for column in columns))
            (raw / f"{stem}.tsv").write_text("\n".join(lines) + "\n")
        prepare(name, raw, folder / name / "bin", dictionary, str)
        return folder / name / "bin"

    return make


def likeliest(src_tokens, target, logits, padding_idx, corrupt=electra_moe.corrupt):
    """corrupt with logits so large that its noise has no effect, so that the result does not depend on the batch."""
    return corrupt(src_tokens, target, 1e6 * logits, padding_idx)


def logged(world_size: int, meeting: str, flags: List[str]) -> Dict[str, List[Dict[str, Any]]]:
    """The metrics of each update and each validation on this rank, before rounding."""
    import fairseq_cli.train
    from fairseq.criterions import sentence_prediction
    from fairseq.logging import meters, metrics

    found: Dict[str, List[Dict[str, Any]]] = {"train": [], "valid": [], "dummies": []}
    train_step, valid_stats, prepare_sample = MoETrainer.train_step, fairseq_cli.train.get_valid_stats, MoETrainer._prepare_sample

    def step(self, *args, **kwargs):
        output = train_step(self, *args, **kwargs)
        found["train"].append(dict(metrics.get_smoothed_values("train_inner")))
        return output

    def stats(cfg, trainer, figures, *args):
        found["valid"].append(dict(figures))
        return valid_stats(cfg, trainer, figures, *args)

    def sample(self, *args, **kwargs):
        made = prepare_sample(self, *args, **kwargs)
        found["dummies"].append(made[1])
        return made

    exact = {"safe_round": lambda number, digits: float(number)}
    with (
        patch.multiple(MoETrainer, train_step=step, _prepare_sample=sample),
        patch.multiple(meters, **exact),
        patch.multiple(sentence_prediction, create=True, **exact),  # fairseq 0.12.2 does not round there
        patch.object(fairseq_cli.train, "get_valid_stats", stats),
        patch.object(electra_moe, "corrupt", likeliest),
    ):
        run(fairseq_cli.train.cli_main, *rank_command(["fairseq-train", *flags], rank_number(), world_size, meeting)[1:])
    return found


def is_number(value: Any) -> bool:
    return value is not None and not isinstance(value, list)


def compare(data: Path, *flags: str, but: Collection[str] = ()) -> Dict[str, List[float]]:
    """Compare both ranks with one process in all metrics except `but`. Returns the metrics of its validations."""
    command = [str(data), "--user-dir", str(USER_DIR), *flags, *FLAGS]
    sizes = {1: ["--batch-size", "8"], 2: ["--batch-size", "4"]}
    (alone,) = run_ranks(1, logged, 1, 0, [*command, *sizes[1]], group=False)
    both = run_ranks(2, logged, 2, meeting_place(), [*command, *sizes[2]], group=False)
    assert [any(rank["dummies"]) for rank in both] == [False, True]
    for rank in both:
        for part in ("train", "valid"):
            assert len(rank[part]) == len(alone[part]) == UPDATES
            for found, expected in zip(rank[part], alone[part]):
                assert found.keys() == expected.keys()
                compared = {name: value for name, value in expected.items() if name not in {*CLOCKS, *but} and is_number(value)}
                assert {name: found[name] for name in compared} == pytest.approx(compared, rel=1e-4, abs=1e-4)
    return {name: [float(figures[name]) for figures in alone["valid"]] for name, value in expected.items() if is_number(value)}


def test_electras_metrics_on_two_ranks_equal_those_of_one_process(data):
    figures = compare(data("SST-2") / "input0", *ELECTRA, "--mask-prob", "0.4", "--moe-log-layers")
    assert "encoder.sentence_encoder.layers.0/moe_load_max" in figures  # without the prefix of a wrapper for DDP
    assert {"mlm_accuracy", "rtd_accuracy", "rtd_precision", "rtd_recall", "mlm_loss", "rtd_loss", "ppl"} <= figures.keys()
    assert all(figures["rtd_accuracy"]) and all(share > 25 for share in figures["expert1_balance_top"])


@pytest.mark.parametrize(
    "name, flags, scores",
    [
        ("SST-2", [], {"accuracy"}),  # summed over ranks
        ("CoLA", ["--report-acc-and-f1"], {"mcc", "f1", "acc_and_f1"}),  # predictions are gathered from all ranks
        ("STS-B", [], {"pearson", "spearman"}),
    ],
)
def test_glue_scores_on_two_ranks_equal_those_of_one_process(name, flags, scores, data):
    if not TASKS[name].has_score():
        pytest.skip("of GLUE's scores, this fairseq computes only accuracy")
    figures = compare(data(name), *SENTENCES, *TASKS[name].flags().split(), *flags, but=BY_SENTENCE)
    assert scores <= figures.keys() and {"moe_gate_loss", "entropy_gating", "expert1_balance_top"} <= figures.keys()
    assert all(any(figures[score]) for score in scores)
