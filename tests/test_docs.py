"""The repository's Markdown: links have targets, and programs can parse the command lines."""

import re
import shlex
from importlib.util import find_spec
from pathlib import Path

import pytest
from fairseq import options

import fairseq_sparsemixer  # noqa: F401
from fairseq_sparsemixer.cli import build_parser
from fairseq_sparsemixer.tools.glue import TASKS

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(
    path
    for path in ROOT.rglob("*.md")
    if not {part for part in path.relative_to(ROOT).parts[:-1] if part.startswith(".") or part in ("runs", "build")}
)
PARSERS = {
    "fairseq-preprocess": options.get_preprocessing_parser,
    "fairseq-train": options.get_training_parser,
    "fairseq-generate": options.get_generation_parser,
    "fairseq-interactive": options.get_interactive_generation_parser,
    "fairseq-eval-lm": options.get_eval_lm_parser,
    "fairseq-validate": options.get_validation_parser,
}
MODELS = {"fairseq-train": ["--arch", "transformer_moe"]}  # for abbreviated commands
TEXT = {page: page.read_text(encoding="utf-8") for page in PAGES}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)


def prose(page):
    """A page's text without its code."""
    return re.sub(r"`[^`\n]*`", "", FENCE.sub("", TEXT[page]))


def anchors(page):
    """The anchors that GitHub makes from the page's headings."""
    found = []
    for heading in re.findall(r"^#+ (.*)$", FENCE.sub("", TEXT[page]), re.M):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        found.append(f"{slug}-{found.count(slug)}" if slug in found else slug)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_within_the_repository_have_targets(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", TEXT[page])):
        if re.match(r"https?:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert ROOT in target.parents, link
        assert not anchor or anchor in anchors(target), link


def test_every_documentation_page_is_in_the_index():
    index = ROOT / "docs" / "README.md"
    linked = {(index.parent / link.split("#")[0]).resolve() for link in re.findall(r"\]\(([^)]+)\)", TEXT[index])}
    assert {page for page in PAGES if page.parent == index.parent} <= linked | {index}


def command_lines(page):
    """The lines of a page's shell commands, fenced or indented, with continued lines joined."""
    fenced = [code for language, code in FENCE.findall(TEXT[page]) if language in ("bash", "")]
    indented = re.findall(r"(?:^    .*\n)+", FENCE.sub("", TEXT[page]), re.M)
    return [line.strip().lstrip("$ ") for code in fenced + indented for line in re.sub(r"\\\n", " ", code).splitlines()]


def programs():
    """(page, program, *words) for each command line with one of our programs or fairseq's."""
    found = []
    for page in PAGES:
        for line in command_lines(page):
            if not re.match(r"(fairseq-|torchrun|srun|python -m|make )", line):
                continue
            line = re.sub(r'"\$\(which (fairseq-\w+)\)"', r"\1", line)
            line = re.sub(r'"?\$\(fairseq-sparsemixer user-dir\)"?|"?\$(UD|USER_DIR)"?', "USER_DIR", line)
            words = shlex.split(line, comments=True)
            cut = [place for place, word in enumerate(words) if word in (">", "<", "|", "&&")]
            words = [word for word in words[: cut[0] if cut else None] if word != "..."]
            found.append((str(page.relative_to(ROOT)), *words))
    return found


def arguments_of(program, words):
    """A program's arguments, without a launcher such as torchrun, srun or launch."""
    place = max(place for place, word in enumerate(words) if word == program)
    return words[place + 1 :]


@pytest.mark.parametrize("command", programs(), ids=" ".join)
def test_a_command_line_can_be_parsed(command):
    page, *words = command
    if "--report-mcc" in words and not TASKS["CoLA"].has_score():
        pytest.skip("this fairseq has no --report-mcc, as docs/tasks.md says")
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    elif words[0] == "python":
        assert find_spec(words[2]) is not None
    elif words[0] == "fairseq-sparsemixer":
        build_parser().parse_args(words[1:])
    for program in sorted(PARSERS):
        if program in words:
            arguments = arguments_of(program, words)
            if "--user-dir" in arguments:  # ours is imported already; the page's own folder does not exist
                place = arguments.index("--user-dir")
                if arguments[place + 1] != "USER_DIR":
                    return
                del arguments[place : place + 2]
            given = MODELS.get(program, []) if "--arch" not in arguments else []
            if program == "fairseq-preprocess":
                PARSERS[program]().parse_args(arguments)
            else:
                options.parse_args_and_arch(PARSERS[program](), arguments + given)
