"""Exchange of checkpoints between two installations, such as two fairseq distributions: one trains, the other continues.

Run in the first environment, then in the second:
  python tests/exchange.py train DIR       train and translate; write models, translations and losses to DIR
  python tests/exchange.py continue DIR    check that the checkpoints give the same translations and, resumed, the same losses
"""

import argparse
import contextlib
import io
import json
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import runs  # noqa: E402

MODELS = {
    "switch": runs.EXPERTS,
    "sparsemixer": [*runs.EXPERTS, "--router", "sparsemixer", "--jitter-eps", "0.1"],
    "dense": ["--router", "dense"],
}
SAMPLES = {"sparsemixer"}  # draw experts, in the order of the sentences
TRAINED, CONTINUED = 6, 9  # updates
FLAGS = ["--required-batch-size-multiple", "1"]
ALL = [
    "--batch-size",
    "64",
    "--no-epoch-checkpoints",
]  # the corpus in one batch, because its order depends on the fairseq version
TOLERANCE = 1e-3  # for scores and losses; translations must be identical


def train(corpus: Path, save_dir: Path, model: str, updates: int) -> list:
    """Train or resume up to `updates` updates; the losses."""
    return runs.train(corpus, save_dir, *MODELS[model], *FLAGS, *ALL, updates=updates)


def translate(corpus: Path, save_dir: Path) -> dict:
    """Translate the validation set: {sentence: [score, words]}."""
    import fairseq_cli.generate

    import fairseq_sparsemixer

    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        runs.run(
            fairseq_cli.generate.cli_main, corpus, "--user-dir", Path(fairseq_sparsemixer.__file__).parent, "--cpu",
            "--path", save_dir / "checkpoint_last.pt", "--gen-subset", "valid", "--beam", 2, "--max-len-b", 12, *FLAGS,
        )  # fmt: skip
    lines = [line.split("\t") for line in output.getvalue().splitlines() if line.startswith("H-")]
    return {name: [float(score), words] for name, score, words in lines}


def results(corpus: Path, folder: Path, model: str) -> dict:
    """Translations by the checkpoint in folder/model, and the losses of a resumed copy of the run."""
    translations = translate(corpus, folder / model)
    again = folder / f"{model}_continued"
    shutil.copytree(folder / model, again)
    try:
        return {"translations": translations, "losses": train(corpus, again, model, CONTINUED)}
    finally:
        shutil.rmtree(again)


def differences(model: str, expected: dict, found: dict) -> list:
    """A message for each difference."""
    said = []
    for name, (score, words) in expected["translations"].items():
        other_score, other_words = found["translations"].get(name, (float("nan"), "nothing"))
        if words != other_words or not abs(score - other_score) <= TOLERANCE:
            said.append(f"{model}, {name}: {words} ({score}) became {other_words} ({other_score})")
    if len(expected["losses"]) != CONTINUED - TRAINED or len(found["losses"]) != CONTINUED - TRAINED:
        said.append(f"{model}: {len(found['losses'])} updates were made, not {CONTINUED - TRAINED}")
    elif model not in SAMPLES:
        for loss, other in zip(expected["losses"], found["losses"]):
            if not abs(loss - other) <= TOLERANCE:
                said.append(f"{model}: the loss {loss} became {other}")
    return said


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["train", "continue"])
    parser.add_argument("folder", type=Path, metavar="DIR")
    options = parser.parse_args()
    folder, record = options.folder, options.folder / "results.json"
    corpus = folder / "corpus" / "bin"
    if options.what == "train":
        (folder / "corpus").mkdir(parents=True)
        runs.make_corpus(folder / "corpus")
        for model in MODELS:
            train(corpus, folder / model, model, TRAINED)
        record.write_text(json.dumps({model: results(corpus, folder, model) for model in MODELS}))
        print(f"exchange: {len(MODELS)} models trained in {folder}")
        return 0
    expected = json.loads(record.read_text())
    said = [line for model in MODELS for line in differences(model, expected[model], results(corpus, folder, model))]
    print("\n".join(said) or f"exchange: {len(MODELS)} models of {folder} translate the same here, and train on the same")
    return int(bool(said))


if __name__ == "__main__":
    sys.exit(main())
