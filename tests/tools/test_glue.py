"""GLUE's files: reading, writing, errors with file and line; fine-tuning on a small separable task."""

import errno
import json
import os
import random

import pytest
from fairseq.data import Dictionary, data_utils

from fairseq_sparsemixer.cli import main
from fairseq_sparsemixer.cli.glue import TASKS as CLI_TASKS
from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.tools import glue

LINES = {  # header and one example of train.tsv in GLUE's format
    "CoLA": (None, "gj04\t0\t*\tw1 w2"),
    "SST-2": ("sentence\tlabel", "w1 w2\t0"),
    "MRPC": ("\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String", "0\t1\t2\tw1 w2\tw3"),
    "STS-B": (
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
        "0\tm\tf\t2012\t1\tn\tn\tw1 w2\tw3\t2.5",
    ),
    "QQP": ("id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", "1\t2\t3\tw1 w2\tw3\t0"),
    "MNLI": (
        "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\tsentence2_parse"
        "\tsentence1\tsentence2\tlabel1\tgold_label",
        "0\t1\t1n\tg\tb\tb\tp\tp\tw1 w2\tw3\tneutral\tcontradiction",
    ),
    "QNLI": ("index\tquestion\tsentence\tlabel", "0\tw1 w2\tw3\tentailment"),
    "RTE": ("index\tsentence1\tsentence2\tlabel", "0\tw1 w2\tw3\tentailment"),
}


def write(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines if line is not None), encoding="utf-8")


@pytest.fixture
def raw(tmp_path):
    """raw(name) -> a folder with one example in each labelled file of the task and one in its first test file."""

    def make(name):
        folder, task, (header, line) = tmp_path / "raw", glue.TASKS[name], LINES[name]
        for stem in ("train", *task.valid):
            write(folder / f"{stem}.tsv", header, line)
        sentences = ["w4 w5", "w6"][: len(task.inputs)]
        write(folder / f"{task.test[0]}.tsv", "\t".join(["index", *task.inputs]), "\t".join(["0", *sentences]))
        return folder

    return make


@pytest.fixture
def dict_file(dictionary, tmp_path):
    dictionary.save(str(tmp_path / "dict.txt"))
    return tmp_path / "dict.txt"


def stored(folder, split, index=0):
    dictionary = Dictionary.load(str(folder / "dict.txt"))
    return dictionary.string(data_utils.load_indexed_dataset(str(folder / split), dictionary)[index])


def test_the_command_line_names_every_task():
    assert CLI_TASKS == tuple(glue.TASKS)


@pytest.mark.parametrize("name", glue.TASKS)
def test_columns_are_mapped_to_inputs_and_label(name, raw, dict_file, tmp_path, capsys):
    assert main(["glue", name, "--raw-dir", str(raw(name)), "--dict", str(dict_file), "--dest-dir", str(tmp_path / "bin")]) == 0
    out, task = tmp_path / "bin", glue.TASKS[name]
    assert [stored(out / "input0", "train"), stored(out / "input0", "test")] == ["w1 w2", "w4 w5"]
    assert (out / "input1").exists() == (len(task.inputs) == 2)
    if (out / "input1").exists():
        assert [stored(out / "input1", "valid"), stored(out / "input1", "test")] == ["w3", "w6"]
    if task.classes:
        assert stored(out / "label", "valid") == task.classes[0]
        assert Dictionary.load(str(out / "label" / "dict.txt")).symbols[4:] == list(task.classes)
    else:
        assert (out / "label" / "valid.label").read_text() == "0.5\n"
    assert (out / "input0" / "valid1.idx").exists() == (name == "MNLI")
    assert task.flags() in capsys.readouterr().out


@pytest.mark.parametrize(
    "line, complaint",
    [
        ("1\t2\t3\tw1\tw2", r"train.tsv:3: 5 columns instead of 6"),
        ("1\t2\t3\tw1\tw2\t2", r"train.tsv:3: label '2' is not one of 0, 1"),
        ("1\t2\t3\tw1\t \t1", r"train.tsv:3: column 'question2' is empty"),
        ("1\t2\t3\tw1\t\udce9\t1", r"train.tsv:3: not UTF-8"),
    ],
)
def test_a_bad_line_is_reported_and_can_be_skipped(line, complaint, raw, dict_file, tmp_path, capsys):
    folder = raw("QQP")
    with (folder / "train.tsv").open("ab") as file:
        file.write(line.encode("utf-8", "surrogateescape") + b"\n" + LINES["QQP"][1].encode() + b"\n")
    command = ["glue", "QQP", "--raw-dir", str(folder), "--dict", str(dict_file), "--dest-dir", str(tmp_path / "bin")]
    with pytest.raises(ConfigurationError, match=complaint):
        main(command)
    assert not (tmp_path / "bin").exists()
    main([*command, "--skip-bad-lines"])
    printed = capsys.readouterr()
    assert "train.tsv:3:" in printed.err and "train: 2 examples" in printed.out


def test_lines_of_a_test_file_are_never_skipped(raw, dict_file, tmp_path, capsys):
    folder = raw("RTE")
    command = ["glue", "RTE", "--raw-dir", str(folder), "--dict", str(dict_file), "--dest-dir", str(tmp_path / "bin")]
    with (folder / "test.tsv").open("a", encoding="utf-8") as file:
        file.write("1\t\tw6\n")
    main([*command, "--skip-bad-lines"])
    assert "test: 2 examples" in capsys.readouterr().out
    assert stored(tmp_path / "bin" / "input0", "test", 1) == ""
    with (folder / "test.tsv").open("a", encoding="utf-8") as file:
        file.write("2\tw4\n")
    with pytest.raises(ConfigurationError, match="test.tsv:4: 2 columns instead of 3; correct it; answers are numbered"):
        main([*command, "--skip-bad-lines"])


@pytest.mark.parametrize("score", ["5.1", "-0.5", "nan", "high"])
def test_a_score_out_of_range_is_refused(score, raw):
    path = raw("STS-B") / "train.tsv"
    path.write_text(path.read_text().replace("2.5", score))
    with pytest.raises(ConfigurationError, match=f"train.tsv:2: score '{score}'"):
        list(glue.read_examples(path, glue.TASKS["STS-B"], labelled=True))


def test_wrong_files_are_refused(raw, dict_file, tmp_path):
    folder = raw("RTE")
    command = ["--raw-dir", str(folder), "--dest-dir", str(tmp_path / "bin")]
    with pytest.raises(ConfigurationError, match="train.tsv:1: no column 'question1' among index"):
        main(["glue", "QQP", *command, "--dict", str(dict_file)])
    with pytest.raises(ConfigurationError, match="--dict .*none.txt does not exist"):
        main(["glue", "RTE", *command, "--dict", str(tmp_path / "none.txt")])
    (tmp_path / "words.txt").write_text("w0 1\nw1\n")
    with pytest.raises(ConfigurationError, match="--dict .*words.txt is not a fairseq dictionary"):
        main(["glue", "RTE", *command, "--dict", str(tmp_path / "words.txt")])
    with pytest.raises(ConfigurationError, match="--sentencepiece-model .*words.txt is not a sentencepiece model"):
        main(["glue", "RTE", *command, "--dict", str(dict_file), "--sentencepiece-model", str(tmp_path / "words.txt")])
    (folder / "dev.tsv").unlink()
    with pytest.raises(ConfigurationError, match="dev.tsv is missing"):
        main(["glue", "RTE", *command, "--dict", str(dict_file)])


@pytest.mark.parametrize("split", ["train", "dev", "test"])
@pytest.mark.parametrize(
    "content", ["", "index\tsentence1\tsentence2\tlabel\n", "sentence1\tsentence1\tsentence2\tlabel\na\tb\tc\tentailment\n"]
)
def test_every_split_is_checked_before_writing(split, content, raw, dict_file, tmp_path):
    folder = raw("RTE")
    (folder / f"{split}.tsv").write_text(content)
    with pytest.raises(ConfigurationError, match=f"{split}.tsv"):
        main(["glue", "RTE", "--raw-dir", str(folder), "--dict", str(dict_file), "--dest-dir", str(tmp_path / "bin")])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dict.txt", "raw"]


def test_a_full_disk_leaves_the_folder_unchanged(raw, dict_file, tmp_path, monkeypatch):
    out = tmp_path / "bin"
    command = ["glue", "RTE", "--raw-dir", str(raw("RTE")), "--dict", str(dict_file), "--dest-dir", str(out)]
    main(command)
    (out / "mine.txt").write_text("mine")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    (tmp_path / "raw" / "train.tsv").write_text("index\tsentence1\tsentence2\tlabel\n0\tw9\tw9\tentailment\n")

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(glue, "_write_labels", full)
        with pytest.raises(ConfigurationError, match="--dest-dir .*bin cannot be written .No space left"):
            main(command)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    main(command)
    assert stored(out / "input0", "train") == "w9" and (out / "mine.txt").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bin", "dict.txt", "raw"]


def test_a_destination_that_is_not_a_folder_is_refused(raw, dict_file, tmp_path, capsys):
    command = ["glue", "RTE", "--raw-dir", str(raw("RTE")), "--dict", str(dict_file), "--dest-dir"]
    (tmp_path / "file").write_text("mine")
    for place in ("/dev/null", str(tmp_path / "file"), str(tmp_path / "file" / "below"), str(tmp_path / ("x" * 300))):
        with pytest.raises(ConfigurationError, match="--dest-dir .* cannot be written"):
            main([*command, place])
    assert (tmp_path / "file").read_text() == "mine"
    with pytest.raises(SystemExit):
        main([*command, ""])
    assert "the name of the folder is empty" in capsys.readouterr().err
    (tmp_path / "none.txt").write_text("")
    with pytest.raises(ConfigurationError, match="--dict .*none.txt has no words"):
        main([*command[:4], "--dict", str(tmp_path / "none.txt"), "--dest-dir", str(tmp_path / "bin")])


def separable(folder, count, seed):
    """A small SST-2: sentences of ten words, where w0 to w4 indicate label 0, and w5 to w9 label 1."""
    draw = random.Random(seed)
    lines = []
    for _ in range(count):
        label = draw.randrange(2)
        words = draw.sample(range(10, 20), 7) + draw.sample(range(5 * label, 5 * label + 5), 3)
        draw.shuffle(words)
        lines.append(" ".join(f"w{word}" for word in words) + f"\t{label}")
    write(folder, "sentence\tlabel", *lines)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["electra_moe_tiny", "roberta_moe_tiny"])
def test_a_pretrained_model_can_be_fine_tuned_on_a_separable_task(arch, run_fairseq, dict_file, tmp_path, caplog, monkeypatch):
    from fairseq import checkpoint_utils

    flags = glue.TASKS["CoLA"].flags()  # for GLUE's harder metric
    separable(tmp_path / "raw" / "train.tsv", 256, seed=1)
    separable(tmp_path / "raw" / "dev.tsv", 128, seed=2)
    main(["glue", "SST-2", "--raw-dir", str(tmp_path / "raw"), "--dict", str(dict_file), "--dest-dir", str(tmp_path / "bin")])
    model = ["--arch", arch, "--num-experts", 4, "--optimizer", "adam", "--log-format", "none", "--no-epoch-checkpoints"]
    criterion = "electra" if arch.startswith("electra") else "moe_masked_lm"
    run_fairseq(
        "train", tmp_path / "bin" / "input0", "--task", "masked_lm", "--criterion", criterion, *model, "--lr", 1e-3,
        "--tokens-per-sample", 32, "--batch-size", 32, "--max-update", 5, "--save-dir", tmp_path / "pretrained",
    )  # fmt: skip
    run_fairseq(
        "train", tmp_path / "bin", "--task", "sentence_prediction", "--criterion", "moe_sentence_prediction", *model,
        "--finetune-from-model", tmp_path / "pretrained" / "checkpoint_last.pt", "--expert-dropout", 0.3, "--lr", 2e-3,
        "--batch-size", 32, "--max-epoch", 6, "--max-positions", 32, "--init-token", 0, "--separator-token", 2,
        *flags.split(), "--save-dir", tmp_path / "tuned",
    )  # fmt: skip
    best = tmp_path / "tuned" / "checkpoint_best.pt"
    state = checkpoint_utils.load_checkpoint_to_cpu(str(best))
    metric, least = ("mcc", 70) if "mcc" in flags else ("accuracy", 85)  # in %; chance is 0 and 50
    assert state["extra_state"]["best"] > least
    assert not any(name.startswith("generator") for name in state["model"])
    monkeypatch.setattr("fairseq_cli.validate.reset_logging", lambda: None)  # otherwise its handlers would stay for other tests
    with caplog.at_level("INFO"):
        run_fairseq(
            "validate", tmp_path / "bin", "--task", "sentence_prediction", "--criterion", "moe_sentence_prediction",
            "--path", best, "--batch-size", 32, "--log-format", "json",
        )  # fmt: skip
    logged = [json.loads(record.message) for record in caplog.records if record.name == "valid"][-1]
    assert float(logged[f"valid_{metric}"]) == state["extra_state"]["best"]


def test_without_the_metrics_in_fairseq_flags_and_command_omit_them(monkeypatch, raw, dict_file, tmp_path, capsys):
    for name in ("report_mcc", "report_acc_and_f1", "report_pearson_and_spearman"):
        monkeypatch.delattr(glue.SentencePredictionConfig, name, raising=False)  # as in fairseq 0.12.2
    assert glue.TASKS["CoLA"].flags() == "--num-classes 2 --best-checkpoint-metric accuracy --maximize-best-checkpoint-metric"
    assert glue.TASKS["STS-B"].flags() == "--num-classes 1 --regression-target --best-checkpoint-metric loss"
    main(["glue", "CoLA", "--raw-dir", str(raw("CoLA")), "--dict", str(dict_file), "--dest-dir", str(tmp_path / "bin")])
    printed = capsys.readouterr()
    assert "--report" not in printed.out and "GLUE's metric for CoLA: checkpoints are chosen by accuracy" in printed.err
