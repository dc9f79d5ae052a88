"""`fairseq-sparsemixer completion`, and the --help of every command."""

import re
import shutil
import subprocess

import pytest

from fairseq_sparsemixer.cli import COMMANDS, main
from fairseq_sparsemixer.cli.completion import SHELLS


@pytest.fixture
def script(capsys):
    """script(shell) -> the output of the command."""

    def printed(shell):
        assert main(["completion", shell]) == 0
        return capsys.readouterr().out

    return printed


@pytest.mark.parametrize("shell", SHELLS)
def test_the_script_names_every_command(shell, script):
    text = script(shell)
    for command in COMMANDS:
        assert re.search(rf"\b{command}\b", text), command


@pytest.fixture
def complete(script, tmp_path):
    """complete(word, ...) -> bash's completions of the last word, in a folder with the file checkpoint.pt and the folder runs."""
    if shutil.which("bash") is None:
        pytest.skip("bash is not installed")
    (tmp_path / "script").write_text(script("bash"))
    folder = tmp_path / "folder"
    (folder / "runs").mkdir(parents=True)
    (folder / "checkpoint.pt").touch()

    def offered(*words):
        line = " ".join(f"'{word}'" for word in ("fairseq-sparsemixer", *words))
        bash = (
            f'source {tmp_path / "script"}; COMP_WORDS=({line}); COMP_CWORD={len(words)}; COMP_LINE="${{COMP_WORDS[*]}}";'
            " function=$(complete -p fairseq-sparsemixer | sed 's/.*-F \\([^ ]*\\).*/\\1/');"
            f" $function fairseq-sparsemixer '{words[-1]}' ''; printf '%s\\n' \"${{COMPREPLY[@]}}\""
        )
        done = subprocess.run(["bash", "-c", bash], cwd=folder, stdout=subprocess.PIPE, text=True, check=True)
        return done.stdout.split()

    return offered


@pytest.mark.parametrize("words, expected", [
    (["stu"], ["study"]),
    (["co"], ["convert", "completion"]),
    (["study", "--dry"], ["--dry-run"]),
    (["study", "--out", ""], ["runs"]),
    (["convert", "check"], ["checkpoint.pt"]),
    (["inspect", "checkpoint.pt", "--json", "check"], ["checkpoint.pt"]),
    (["completion", "b"], ["bash"]),
])  # fmt: skip
def test_bash_completes_commands_flags_and_paths(words, expected, complete):
    assert sorted(complete(*words)) == sorted(expected)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_every_command_has_an_example(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    text = capsys.readouterr().out
    assert re.search(r"^examples?:\n  .*fairseq", text, re.M)
