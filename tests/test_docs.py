"""The texts tell the truth: their code runs, their commands exist, their paths and links lead somewhere."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from moe.cli import main

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
TEXTS = [README, ROOT / "CONTRIBUTING.md", ROOT / "kernels" / "README.md"]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
ROOT_PATH = re.compile(
    r"(?:moe|kernels|benchmarks|tests|examples|\.ci)/[\w./-]*|[A-Z]\w+(?:\.md|file)?|pyproject\.toml"
)


def blocks(text: Path, *languages: str) -> list[str]:
    return [
        body for language, body in BLOCK.findall(text.read_text(encoding="utf-8")) if language in languages
    ]


def names(text: Path) -> str:
    return text.relative_to(ROOT).as_posix()


def test_the_python_of_the_readme_runs(tmp_path):
    """All blocks in order, as one script, because later ones use the names of earlier ones."""
    code = blocks(README, "python")
    assert code
    script = tmp_path / "readme.py"
    script.write_text(
        "\n".join(f"# README, block {n}\n{body}" for n, body in enumerate(code, 1)), encoding="utf-8"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, script], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("text", TEXTS, ids=names)
def test_every_command_exists(text, capsys):
    """`sparse-moe <command> [<action>] --<option>`: the help knows all of them."""
    commands = re.findall(
        r"(?:sparse-moe|python -m moe) ([a-z]+)([^\n`|]*)", text.read_text(encoding="utf-8")
    )
    for command, rest in commands:
        known = help_of(capsys, command)
        action = rest.split()[0] if rest.split() else ""
        if action.isalpha() and re.search(rf"^ +{action}\b", known, re.MULTILINE):
            known = help_of(capsys, command, action)
        for option in re.findall(r"(?<= )--[a-z][a-z-]*", rest):
            assert option in known, f"sparse-moe {command} {action} has no {option}"


def help_of(capsys, *words: str) -> str:
    with pytest.raises(SystemExit) as left:
        main([*words, "--help"])
    assert left.value.code == 0, f"there is no sparse-moe {' '.join(words)}"
    return capsys.readouterr().out


@pytest.mark.parametrize("text", TEXTS, ids=names)
def test_every_make_target_exists(text):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    inline = re.findall(r"`(make [^`]*)`", text.read_text(encoding="utf-8"))
    for target in re.findall(r"^make ([a-z-]+)", "\n".join([*blocks(text, "bash"), *inline]), re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"make {target}"


@pytest.mark.parametrize("text", TEXTS, ids=names)
def test_every_benchmark_named_exists(text):
    for module in re.findall(r"python -m (benchmarks\.\w+)", text.read_text(encoding="utf-8")):
        assert (ROOT / f"{module.replace('.', '/')}.py").is_file(), module


@pytest.mark.parametrize("text", TEXTS, ids=names)
def test_every_path_exists(text):
    """Inline code and examples in shell blocks that look like a path of the repository."""
    quoted = re.findall(r"`([^`\n]+)`", BLOCK.sub("", text.read_text(encoding="utf-8")))
    words = [word for part in quoted + blocks(text, "bash") for word in part.split()]
    for word in words:
        if ROOT_PATH.fullmatch(word) and ("/" in word or "." in word or word in ("Makefile", "LICENSE")):
            assert (ROOT / word).exists(), f"{names(text)} names {word}"


def test_every_path_of_the_layout_tree_exists():
    (tree,) = [body for body in blocks(README, "text") if "moe/" in body and "tests/" in body]
    folder = ROOT
    for line in tree.splitlines():
        name = line.split()[0]
        if line.startswith(" "):
            assert (folder / name).exists(), f"{folder.name}/{name}"
        else:
            folder = ROOT / name
            assert folder.exists(), name


@pytest.mark.parametrize("text", [*TEXTS, ROOT / "CHANGELOG.md"], ids=names)
def test_every_relative_link_resolves(text):
    for target in re.findall(r"\]\(([^)\s]+)\)", text.read_text(encoding="utf-8")):
        if not re.match(r"[a-z]+:", target):
            path, _, anchor = target.partition("#")
            page = text.parent / path if path else text
            assert page.exists(), target
            assert not anchor or anchor in anchors(page), target


def anchors(page: Path) -> set[str]:
    """The anchors that a code host makes of the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
