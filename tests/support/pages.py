"""What the documentation says one can type: commands, Python and YAML blocks of README.md and docs/*.md."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(
    r"^```(?P<kind>\w*)(?: title=\"(?P<title>[^\"]+)\")?\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE
)


@dataclass(frozen=True)
class Block:
    """One fenced block."""

    page: str
    kind: str
    title: str | None
    text: str


def blocks(page: Path) -> list[Block]:
    """Fenced blocks of a page, in order."""
    name = page.relative_to(ROOT).as_posix() if page.is_relative_to(ROOT) else page.name
    return [Block(name, m["kind"], m["title"], m["text"]) for m in FENCE.finditer(page.read_text())]


def commands(text: str) -> list[list[str]]:
    """Command lines of a shell block as words, without comments, prompts, pipes and redirections."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line.removeprefix("$ "), comments=True)
        for mark in ("|", ">", ">>", "2>&1", "&&"):
            if mark in words:
                words = words[: words.index(mark)]
        while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
            words = words[1:]
        if words:
            found.append(words)
    return found


def all_blocks(kind: str) -> list[Block]:
    """Blocks of one kind on all pages."""
    return [block for page in PAGES for block in blocks(page) if block.kind == kind]


def unique_commands(program: str) -> list[list[str]]:
    """Different command lines of one program, in the order in which they appear."""
    lines = [tuple(words) for block in all_blocks("bash") for words in commands(block.text)]
    return [list(words) for words in dict.fromkeys(lines) if words[0] == program]
