"""A study with interruptions, failures, a full disk or an edited spec. A script replaces fairseq."""

import errno
import fcntl
import io
import json
import os
import signal
import sys
import time
from pathlib import Path
from threading import Thread

import pytest
import yaml
from ranks import start_ranks
from rich.console import Console
from rich.progress import Progress

from fairseq_sparsemixer.cli import main
from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.files import write_whole
from fairseq_sparsemixer.tools.study import runner
from fairseq_sparsemixer.tools.study.spec import read_study

SPEC = {
    "title": "played", "data": "bin", "flags": {"task": "translation", "max-update": 20}, "num-experts": [2], "seeds": [1, 2],
    "routers": {"dense": {"router": "dense"}, "switch": {"router": "switch"}}, "baseline": "switch",
    "test": {"metric": "bleu", "reference": "test.de"},
}  # fmt: skip
# training of Switch's first seed runs `program` in the data folder
PLAYER = """
import os, signal, sys, time
program, data, *flags = sys.argv[1:]
value = lambda name: flags[flags.index("--" + name) + 1]
with open(os.path.join(data, "started"), "a") as file:
    print(os.getpid(), program, file=file)
if program == "train" and (value("router"), value("seed")) == ("switch", "1"):
    exec(open(os.path.join(data, "program")).read())
if program == "train":
    with open(value("log-file"), "a") as log:
        print('t | INFO | valid | {"valid_loss": "5", "valid_num_updates": "20"}', file=log)
if program == "generate":
    print("D-0\\t-1\\tein Hund\\nD-1\\t-1\\tzwei Katzen")
"""
NAMES = ["dense-seed1", "switch-e2-seed1", "dense-seed2", "switch-e2-seed2"]


@pytest.fixture
def study(tmp_path, monkeypatch) -> Path:
    """The path of a study that runs PLAYER instead of fairseq."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "program").write_text("")
    (tmp_path / "test.de").write_text("ein Hund\nzwei Katzen\n", encoding="utf-8")
    (tmp_path / "player.py").write_text(PLAYER)
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(SPEC, sort_keys=False))
    monkeypatch.setattr(runner, "REFRESH", 0.01)
    monkeypatch.setattr(runner, "executable", played(tmp_path / "player.py"))
    return tmp_path / "study.yaml"


def played(player: Path):
    return lambda command: [sys.executable, str(player), command[0].split("-")[1], *command[1:]]


def finished(out: Path):
    return [name for name in NAMES if (out / "runs" / name / "result.json").exists()]


def run_played(spec: Path, out: Path) -> int:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell, such as these tests, ignore SIGINT
    runner.executable = played(spec.parent / "player.py")
    return main(["study", str(spec), "--out", str(out), "--workers", "1"])


def is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interruption_stops_running_trainings_and_starts_no_more(number, study, tmp_path):
    (tmp_path / "bin" / "program").write_text("time.sleep(1000)")
    (process,) = start_ranks(1, run_played, study, tmp_path / "out", group=False)
    started = tmp_path / "bin" / "started"
    while not (started.exists() and len(started.read_text().split("\n")) == 4):  # dense is trained and tested
        time.sleep(0.01)
    process.kill(number)
    assert process.result() == 130
    assert finished(tmp_path / "out") == NAMES[:1]
    training = int(started.read_text().split("\n")[2].split()[0])
    assert len(started.read_text().split("\n")) == 4 and not is_alive(training)


@pytest.mark.parametrize(
    "program, reason",
    [
        ("raise ValueError('a bad flag')", "ValueError: a bad flag"),
        ("print('fairseq-sparsemixer: --lr -1 is bad'); print('warned'); sys.exit(1)", "fairseq-sparsemixer: --lr -1 is bad"),
        ("print('nothing of note'); sys.exit(2)", "nothing of note"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "killed by SIGKILL, possibly out of memory"),
        ("sys.exit(1)", "it printed nothing"),
    ],
)
def test_a_failed_run_gives_a_one_line_reason_and_the_others_continue(program, reason, study, tmp_path):
    out = tmp_path / "out"
    (tmp_path / "bin" / "program").write_text("print('RuntimeError: of the attempt before'); sys.exit(1)")
    runner.run_study(read_study(study), out, workers=1)
    (tmp_path / "bin" / "program").write_text(program)
    failures = runner.run_study(read_study(study), out, workers=1)
    output = out / "runs" / "switch-e2-seed1" / "output.txt"
    assert failures == [f"switch-e2-seed1 failed in training: {reason} (see {output})"]
    assert finished(out) == [NAMES[0], *NAMES[2:]]


def test_a_test_without_a_score_fails_only_its_run(study, tmp_path):
    (tmp_path / "test.de").write_text("ein Hund\n", encoding="utf-8")
    failures = runner.run_study(read_study(study), tmp_path / "out", workers=2)
    assert len(failures) == 4 and "dense-seed1 failed in its test: " in failures[0] and "has 2 hypotheses" in failures[0]


def test_a_full_disk_is_reported_and_fails_one_run(study, tmp_path, monkeypatch):
    def write(path, text):
        if path.parent.name == "switch-e2-seed1" and path.name == "result.json":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_whole(path, text)

    monkeypatch.setattr(runner, "write_whole", write)
    (failure,) = runner.run_study(read_study(study), tmp_path / "out", workers=1)
    assert failure.startswith("switch-e2-seed1 failed: ") and "No space left on device" in failure
    assert finished(tmp_path / "out") == [NAMES[0], *NAMES[2:]]


def test_a_truncated_result_is_ignored(study, tmp_path):
    out = tmp_path / "out"
    runner.run_study(read_study(study), out, workers=1)
    for name, text in zip(NAMES, ("", '{"run": "swi')):
        (out / "runs" / name / "result.json").write_text(text)
    times = {name: (out / "runs" / name / "result.json").stat().st_mtime_ns for name in NAMES[2:]}
    assert runner.run_study(read_study(study), out, workers=1) == []
    assert [json.loads((out / "runs" / name / "result.json").read_text())["run"] for name in NAMES] == NAMES
    assert times == {name: (out / "runs" / name / "result.json").stat().st_mtime_ns for name in NAMES[2:]}


def test_seeds_can_be_added_but_flags_of_finished_runs_cannot_change(study, tmp_path):
    out = tmp_path / "out"
    runner.run_study(read_study(study), out, workers=1)
    study.write_text(yaml.safe_dump({**SPEC, "seeds": [1, 2, 3]}, sort_keys=False))
    assert runner.run_study(read_study(study), out, workers=1) == []
    assert (out / "runs" / "dense-seed3" / "result.json").exists()
    study.write_text(yaml.safe_dump({**SPEC, "flags": {"task": "translation", "max-update": 40}}, sort_keys=False))
    with pytest.raises(ConfigurationError, match="--max-update 20 where the study now has --max-update 40; give another --out"):
        runner.run_study(read_study(study), out, workers=1)


def test_data_prepared_again_is_refused_for_existing_runs(study, tmp_path):
    dictionary = tmp_path / "bin" / "dict.en.txt"
    dictionary.write_text("Hund 2\n")
    runner.run_study(read_study(study), tmp_path / "out", workers=1)
    dictionary.write_text("Katze 2\n")
    with pytest.raises(ConfigurationError, match="was begun with other data than .*bin has now; give another --out"):
        runner.run_study(read_study(study), tmp_path / "out", workers=1)
    dictionary.write_text("Hund 2\n")
    assert runner.run_study(read_study(study), tmp_path / "out", workers=1) == []


def test_run_folders_of_earlier_versions_without_a_note_are_accepted(study, tmp_path):
    runner.run_study(read_study(study), tmp_path / "out", workers=1)
    folders = [tmp_path / "out" / "runs" / name for name in NAMES]
    for folder in folders:
        (folder / "step.json").unlink()
    (folders[1] / "result.json").unlink()
    times = {folder: (folder / "result.json").stat().st_mtime_ns for folder in folders if folder != folders[1]}
    assert runner.run_study(read_study(study), tmp_path / "out", workers=1) == []
    assert times == {folder: (folder / "result.json").stat().st_mtime_ns for folder in times}
    assert all(json.loads((folder / "step.json").read_text())["finished"] for folder in folders)


def test_moving_the_package_keeps_the_study(study, tmp_path):
    runner.run_study(read_study(study), tmp_path / "out", workers=1)
    note = tmp_path / "out" / "runs" / "dense-seed1" / "command.txt"
    note.write_text(note.read_text().replace("--user-dir /", "--user-dir /elsewhere/"))
    assert runner.run_study(read_study(study), tmp_path / "out", workers=1) == []


def test_a_study_waits_for_a_training_of_an_earlier_study(study, tmp_path):
    folder, said = tmp_path / "out" / "runs" / "dense-seed1", io.StringIO()
    folder.mkdir(parents=True)
    progress = Progress(console=Console(file=said, width=200))
    with (folder / "lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        thread = Thread(target=runner.run_study, args=(read_study(study), tmp_path / "out", 1, progress))
        thread.start()
        while "dense-seed1 waits for its training" not in said.getvalue():
            time.sleep(0.01)
        assert finished(tmp_path / "out") == []
    thread.join()
    assert finished(tmp_path / "out") == NAMES


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux kills children when their parent dies")
def test_a_killed_study_leaves_no_training_behind(study, tmp_path):
    (tmp_path / "bin" / "program").write_text("time.sleep(1000)")
    (process,) = start_ranks(1, run_played, study, tmp_path / "out", group=False)
    started = tmp_path / "bin" / "started"
    while not (started.exists() and len(started.read_text().split("\n")) == 4):
        time.sleep(0.01)
    process.kill(signal.SIGKILL)
    training = int(started.read_text().split("\n")[2].split()[0])
    while is_alive(training):
        time.sleep(0.01)


def test_concurrent_studies_run_each_training_once(study, tmp_path):
    failures = []
    threads = [Thread(target=lambda: failures.extend(runner.run_study(read_study(study), tmp_path / "out", 1))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    programs = [line.split()[1] for line in (tmp_path / "bin" / "started").read_text().splitlines()]
    assert failures == [] and finished(tmp_path / "out") == NAMES
    assert sorted(programs) == ["generate"] * 4 + ["train"] * 4


def test_one_of_two_concurrent_studies_with_different_flags_is_refused(study, tmp_path):
    other = tmp_path / "other.yaml"
    other.write_text(
        yaml.safe_dump({**SPEC, "seeds": [2, 1], "flags": {"task": "translation", "max-update": 40}}, sort_keys=False)
    )
    said = []

    def work(spec):
        try:
            said.append(runner.run_study(read_study(spec), tmp_path / "out", 1))
        except ConfigurationError as error:
            said.append(error.message)

    threads = [Thread(target=work, args=(spec,)) for spec in (study, other)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [] in said and sum("begun with other flags" in str(what) for what in said) == 1
    commands = {(tmp_path / "out" / "runs" / name / "command.txt").read_text().count("--max-update 40") for name in NAMES}
    assert len(commands) == 1  # all runs belong to one study


def test_a_refused_study_claims_no_folder(study, tmp_path):
    out = tmp_path / "out"
    runner.run_study(read_study(study), out, workers=1)
    study.write_text(
        yaml.safe_dump({**SPEC, "seeds": [3, 1], "flags": {"task": "translation", "max-update": 40}}, sort_keys=False)
    )
    with pytest.raises(ConfigurationError, match="begun with other flags"):
        runner.run_study(read_study(study), out, workers=1)
    assert sorted(path.name for path in (out / "runs").iterdir() if path.is_dir()) == sorted(NAMES)


@pytest.mark.parametrize("command", ["fairseq-train 'x", "\udce9"])
def test_a_damaged_command_file_gives_a_one_line_error(study, tmp_path, command):
    folder = tmp_path / "out" / "runs" / "dense-seed1"
    folder.mkdir(parents=True)
    (folder / "command.txt").write_text(command, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(ConfigurationError, match="command.txt is not a command line"):
        runner.run_study(read_study(study), tmp_path / "out", workers=1)


@pytest.mark.parametrize("out", ["file", "file/below", "x" * 300, "a\0b"])
def test_an_unwritable_folder_gives_a_one_line_error(study, tmp_path, out):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigurationError, match="cannot be written .*; give another --out"):
        runner.run_study(read_study(study), tmp_path / out, workers=1)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    "gpus, visible, workers, expected",
    [
        (2, "", None, ["0", "1"]),
        (2, "5,7", 3, ["5", "7", "5"]),
        (1, "GPU-8932f937", None, ["GPU-8932f937"]),
    ],
)
def test_runs_use_the_visible_gpus(gpus, visible, workers, expected, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [place["CUDA_VISIBLE_DEVICES"] for place in runner.devices(workers)] == expected


def test_cores_are_divided_evenly_and_every_run_has_a_thread(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(8)), raising=False)
    for workers, count, threads in ((None, 8, "1"), (3, 3, "2"), (20, 20, "1")):
        assert runner.devices(workers) == [{"OMP_NUM_THREADS": threads}] * count
