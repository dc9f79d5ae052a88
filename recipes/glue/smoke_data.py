"""A tiny data set in the format of a GLUE task, for --smoke: short sentences in which one word determines the label."""

import random
from pathlib import Path

SIZES = {"train": 64, "dev": 20}
WORDS = ("the", "of", "and", "in", "to", "was", "on", "as", "for", "with")


def write_smoke_data(name: str, folder: Path) -> None:
    """Write folder/train.tsv, dev.tsv and so on, in GLUE's format for that task."""
    from fairseq_sparsemixer.tools.glue import TASKS

    task, draw = TASKS[name], random.Random(1)
    folder.mkdir(parents=True, exist_ok=True)
    columns = list(task.columns or (*task.inputs, task.label))
    for split in ("train", *task.valid):
        lines = [] if task.columns else ["\t".join(columns)]
        for number in range(SIZES["train" if split == "train" else "dev"]):
            kind = number % max(len(task.classes), 2)
            sentence = " ".join(draw.choice(WORDS) for _ in range(5)) + f" {WORDS[kind]}" * 3
            row = {**dict.fromkeys(columns, "-"), **dict.fromkeys(task.inputs, sentence)}
            row[task.label] = task.classes[kind] if task.classes else f"{2.5 * kind + draw.random():.3f}"
            lines.append("\t".join(row[column] for column in columns))
        (folder / f"{split}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
