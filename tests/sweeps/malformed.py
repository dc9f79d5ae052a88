"""Malformed inputs, generated from valid ones: flags, paths, checkpoints, study specs, TSV files, logs.

Each Case is a command line of `fairseq-sparsemixer` that must fail with a one-line error or, with `may_pass`, may also
succeed: a file with a damaged byte may be readable, and 0 is a valid seed.
"""

import argparse
import copy
import json
import os
import random
import stat
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Tuple

import torch
import yaml

from fairseq_sparsemixer.cli import build_parser

NOT_NUMBERS = ("", "x", "1,5", "0x10")
NOT_FINITE = ("nan", "inf", "-inf", "1e999")
EXTREME = ("-1", "0", "99999999999999999999", "1e-320")
INFINITY_IS_A_VALUE = {("fidelity", "--jitter-eps"), ("upcycle", "--jitter-eps"), ("upcycle", "--capacity-factor")}


class Case(NamedTuple):
    """The arguments, the words of which the message must contain one, and whether success is allowed."""

    name: str
    arguments: List[str]
    mentions: Tuple[str, ...]
    may_pass: bool = False


def number_flags(commands: Dict[str, List[str]]) -> Iterator[Case]:
    """Every numeric flag of every command with values that are not a number, not finite, or extreme.

    commands: valid arguments for each command.
    """
    parsers = next(action for action in build_parser()._actions if isinstance(action, argparse._SubParsersAction)).choices
    for command, arguments in commands.items():
        head, tail = arguments, []
        if "--" in arguments:  # launch's command comes last
            cut = arguments.index("--")
            head, tail = arguments[:cut], arguments[cut:]
        for action in parsers[command]._actions:
            flag = next((name for name in action.option_strings if name.startswith("--")), None)
            if flag is None or action.type not in (int, float):
                continue
            for value in (*NOT_NUMBERS, *NOT_FINITE, *EXTREME):
                allowed = value in ("inf", "1e999") and (command, flag) in INFINITY_IS_A_VALUE
                yield Case(
                    f"{command} {flag} {value!r}",
                    [command, *head, f"{flag}={value}", *tail],
                    (flag,),
                    allowed or value in EXTREME,
                )


def paths(commands: Dict[str, List[str]], files: Dict[str, List[str]], folder: Path) -> Iterator[Case]:
    """Every input file of every command replaced by something that is not such a file.

    files: for each command, its arguments that are input files.
    """
    (folder / "empty").write_bytes(b"")
    (folder / "junk").write_bytes(random.Random(1).randbytes(4096))
    (folder / "a folder").mkdir()
    os.mkfifo(folder / "fifo")
    os.symlink(folder / "nowhere", folder / "dangling")
    replacements = [
        *(str(folder / name) for name in ("missing", "empty", "junk", "a folder", "fifo", "dangling", "junk/below a file")),
        *("", "/dev/null", str(folder / ("x" * 300)), "a\0b"),
    ]
    for command, arguments in commands.items():
        for file in files.get(command, ()):
            for replacement in replacements:
                changed = [replacement if word == file else word for word in arguments]
                name = os.path.basename(replacement) or "''"
                yield Case(
                    f"{command} {os.path.basename(file)} -> {name[:20]!r}",
                    [command, *changed],
                    (replacement[:100] or "empty", os.path.basename(file), "path"),
                    may_pass=replacement == "/dev/null" and command == "launch",
                )


def full_device(path: Path) -> str:
    """A device that is always full. Root could replace /dev/full, so it gets a separate device."""
    if os.access("/dev", os.W_OK):
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 7))
        return str(path)
    return "/dev/full"


def outputs(commands: Dict[str, List[str]], flags: Dict[str, List[str]], folder: Path) -> Iterator[Case]:
    """Every output of every command directed to a place that cannot be written.

    flags: for each command, its output flags; "" stands for its last argument.
    """
    (folder / "a file").write_text("mine\n")
    (folder / "full folder").mkdir()
    (folder / "full folder" / "thesis.txt").write_text("mine\n")
    full = full_device(folder / "full device")
    for command, arguments in commands.items():
        for flag in flags.get(command, ()):
            for target in (
                "a file/below",
                "full folder",
                "missing folder/deep/" + "x" * 300,
                "/proc/nothing/here",
                full,
                "",
            ):
                if target == full and command == "upcycle" and flag:
                    continue  # writing to the device fails only after OUT is complete
                path = target if target.startswith("/") or not target else str(folder / target)
                changed = [*arguments[:-1], path] if flag == "" else [*arguments, f"{flag}={path}"]
                yield Case(
                    f"{command} {flag or 'OUT'} {target[:24]!r}",
                    [command, *changed],
                    (path or "''", flag or "OUT", "empty"),
                    may_pass=target == "full folder" and flag in ("--out", "--dest-dir"),
                )


def checkpoints(good: Path, folder: Path, commands: Dict[str, List[str]], count: int) -> Iterator[Case]:
    """Damaged checkpoints for every command that reads one; `good` in its arguments is replaced.

    Each is truncated, has changed bytes, or has values of wrong types at a random place, with a fixed seed.
    """
    draw = random.Random(1)
    whole = good.read_bytes()
    for index in range(count):
        path = folder / f"damaged{index}.pt"
        kind, must_fail = _damage(draw, good, whole, path)
        command = draw.choice(sorted(commands))
        arguments = [str(path) if word == str(good) else word for word in commands[command]]
        yield Case(f"{command} of a checkpoint {kind}", [command, *arguments], (str(path),), may_pass=not must_fail)


def _damage(draw: random.Random, good: Path, whole: bytes, path: Path) -> Tuple[str, bool]:
    """Write a damaged copy. Returns the damage, and whether every command must refuse the file."""
    kind = draw.choice(["cut", "bytes", "without", "type", "top"])
    if kind == "cut":
        size = draw.randrange(len(whole) - 30)
        path.write_bytes(whole[:size])
        return f"cut after {size} bytes", True
    if kind == "bytes":
        data = bytearray(whole)
        for _ in range(draw.randrange(1, 40)):
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        path.write_bytes(bytes(data))
        return "with bits flipped", False
    if kind == "top":
        top = draw.choice([[], None, 3, "text", {}, {"model": None}, {"model": []}, {"model": {"a": "text"}}, torch.zeros(2)])
        torch.save(top, path)
        return f"that is {str(top)[:20]}", True
    state = copy.deepcopy(torch.load(good, weights_only=False))
    key = draw.choice(sorted(state))
    if kind == "without":
        del state[key]
        torch.save(state, path)
        return f"without {key}", key == "model"
    wrong = draw.choice([None, 3, "text", [], [1, 2], {"a": 1}, torch.zeros(1), float("nan")])
    if key == "model" and draw.random() < 0.5:
        name = draw.choice(sorted(state["model"]))
        state["model"][name] = wrong
        torch.save(state, path)
        return f"with {name} = {str(wrong)[:20]}", False
    state[key] = wrong
    torch.save(state, path)
    return f"with {key} = {str(wrong)[:20]}", key == "model"


def specs(good: Dict[str, Any], folder: Path) -> Iterator[Case]:
    """Study specs with a missing or wrongly typed key, at every depth, and invalid YAML."""
    wrong = (None, True, 3, -1, float("nan"), "x" * 5000, [], [None], {}, {"a": None}, [[1]], [True], [1.5], ["1"])
    optional_values = {"title"}  # any text is valid
    number = 0
    for place in _places(good):
        for value in ("missing", *wrong):
            content = copy.deepcopy(good)
            holder = content
            for key in place[:-1]:
                holder = holder[key]
            if value == "missing":
                del holder[place[-1]]
            elif type(value) is type(holder[place[-1]]) and value:  # another value of the same type may be valid
                continue
            else:
                holder[place[-1]] = value
            path = folder / f"spec{number}.yaml"
            path.write_text(yaml.safe_dump(content), encoding="utf-8")
            number += 1
            name = ".".join(map(str, place))
            lenient = len(place) > 1 or place[0] in optional_values | {"test", "flags"}
            yield Case(
                f"study with {name} = {str(value)[:12]}",
                ["study", str(path), "--out", str(folder / "study"), "--dry-run"],
                (str(path),),
                may_pass=lenient,
            )
    text = yaml.safe_dump(good)
    bomb = "a: &a [x, x]\n" + "".join(f"{chr(98 + i)}: &{chr(98 + i)} [*{chr(97 + i)}, *{chr(97 + i)}]\n" for i in range(24))
    for name, content in {
        "a tab": "\t" + text,
        "two documents": text + "---\n" + text,
        "a key twice": text + "seeds: [1]\n",
        "alias bomb": bomb + text,
        "depth": "[" * 3000 + "]" * 3000,
        "an object": "!!python/object/apply:os.system ['true']\n",
        "a list": "- 1\n",
        "bytes": "\x00\x01",
        "a flag cut short": text.replace("lr:", "l:"),
    }.items():
        path = folder / f"spec{number}.yaml"
        path.write_text(content, encoding="utf-8")
        number += 1
        yield Case(
            f"study with {name}", ["study", str(path), "--out", str(folder / "study"), "--dry-run"], (str(path),), may_pass=False
        )


def _places(value: Any, place: Tuple = ()) -> Iterator[Tuple]:
    if isinstance(value, dict):
        for key in value:
            yield (*place, key)
            yield from _places(value[key], (*place, key))


def logs(train_log: List[Dict[str, Any]], load_log: List[Dict[str, Any]], folder: Path) -> Iterator[Case]:
    """Runs for `plot` with invalid values in the log or load file: each field of each line is replaced."""
    wrong = (None, "x", [], {}, True, -1, float("nan"), float("inf"), "nan", [[]], [["a"]], 1e308, 10**400)
    number = 0
    for file, lines in (("train.log", train_log), ("load.jsonl", load_log)):
        for row, line in enumerate(lines):
            for key in line:
                for value in wrong:
                    run = folder / f"run{number}"
                    run.mkdir()
                    number += 1
                    changed = copy.deepcopy({"train.log": train_log, "load.jsonl": load_log})
                    changed[file][row][key] = value
                    for name, content in changed.items():
                        (run / name).write_text("".join(json.dumps(entry) + "\n" for entry in content), encoding="utf-8")
                    yield Case(
                        f"plot with {file} {key} = {str(value)[:10]}",
                        ["plot", str(run), "--out", str(run), "--json", str(run / "figures.json")],
                        (str(run),),
                        may_pass=True,
                    )


def tables(folder: Path, dictionary: Path) -> Iterator[Case]:
    """GLUE's TSV files with malformed lines, in each split."""
    header, good = "sentence1\tsentence2\tscore\n", "w1 w2\tw2\t2.5\n"
    bad = {
        "empty": "", "no header": good, "header alone": header, "a column short": header + "w1\t2.5\n",
        "text for a score": header + "w1\tw2\tx\n", "nan": header + "w1\tw2\tnan\n", "inf": header + "w1\tw2\tinf\n",
        "a score above 5": header + "w1\tw2\t5.1\n", "negative": header + "w1\tw2\t-1\n", "no sentence": header + "\tw2\t1\n",
        "bytes": None, "missing": None, "a column twice": "sentence1\tsentence1\tscore\n" + good,
    }  # fmt: skip
    for split in ("train", "dev", "test"):
        for name, content in bad.items():
            raw = folder / f"{split} {name}"
            raw.mkdir()
            for part in ("train", "dev", "test"):
                (raw / f"{part}.tsv").write_text(header + good)
            path = raw / f"{split}.tsv"
            if name == "missing":
                path.unlink()
            elif name == "bytes":
                path.write_bytes(b"\xff\xfe" + header.encode() + b"\xff\t\xff\t1\n")
            else:
                path.write_text(content)
            unlabelled = split == "test" and name in (
                "text for a score",
                "nan",
                "inf",
                "a score above 5",
                "negative",
                "no sentence",
                "missing",
            )
            out = folder / f"{split} {name} out"
            yield Case(
                f"glue with {split} {name}",
                ["glue", "STS-B", "--raw-dir", str(raw), "--dict", str(dictionary), "--dest-dir", str(out)],
                (str(path),),
                may_pass=unlabelled,
            )
