"""The documentation tells the truth: commands parse, Python imports resolve, files and links are there."""

import ast
import importlib
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonargparse
import pytest
import yaml
from pages import FENCE, PAGES, ROOT, all_blocks, blocks, commands, unique_commands

from thalweg.apps import cli, trainer_cli

COMMANDS = unique_commands("thalweg")
PYTHON = all_blocks("python")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files that commands name: titled YAML blocks and a run to resume."""
    for block in all_blocks("yaml"):
        if block.title:
            (tmp_path / block.title).write_text(block.text)
    run = tmp_path / "runs" / "run" / "version_0"
    (run / "checkpoints").mkdir(parents=True)
    shutil.copy(trainer_cli.find_config("poseidon/tiny.yaml"), run / "config.yaml")
    (run / "checkpoints" / "last.ckpt").touch()
    monkeypatch.chdir(tmp_path)
    # An abbreviated option works today, with a warning that it will not; pages spell options out.
    monkeypatch.setattr(jsonargparse.ArgumentParser, "_get_option_tuples", lambda self, text: [])
    return tmp_path


def parse(argv: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Parse a command line with the parser that would run it, and stop there.

    Raises:
        SystemExit: With a message if the command line would be refused.
    """
    if argv[0] in cli.TRAINER:
        with pytest.raises(SystemExit) as caught:
            cli.main([*argv, "--print_config"])
        if caught.value.code not in (0, None):
            raise caught.value
        return
    capture, auto_cli = jsonargparse.capture_parser, jsonargparse.auto_cli

    def only_parse(function: Callable[..., Any], args: list[str], **how: Any) -> None:
        capture(auto_cli, function, args=[], **how).parse_args(args)

    with monkeypatch.context() as patch:
        patch.setattr(jsonargparse, "capture_parser", lambda _, *args, **how: capture(auto_cli, *args, **how))
        patch.setattr(jsonargparse, "auto_cli", only_parse)
        try:
            cli.main(argv)
        except SystemExit as stop:
            if stop.code not in (0, None):
                raise


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_command_parses(words: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parse(words[1:], monkeypatch)


def test_the_pages_show_every_verb() -> None:
    shown = {words[1] for words in COMMANDS}
    assert shown >= {*cli.TRAINER, *cli.VERBS} - {"demo"}  # make demo
    assert {words[2] for words in COMMANDS if words[1] == "data"} == {*cli.VERBS["data"][0]}


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("thalweg evaluate --ckpt runs/run/version_0 --dataset NS-Sines --ar_stepz 7", "ar_stepz"),
        ("thalweg fit --app poseidon --trainer.max_epoch 3", "max_epoch"),
        ("thalweg fit --app poseidon --data.num_trajectory 3", "num_trajectory"),
        ("thalweg fit --config poseidon/tinny.yaml", "tinny"),
        ("thalweg data generate NS-Sines --sample 4", "sample"),
        ("thalweg export --to my-scot", "ckpt"),
        ("thalweg gain --curve.a a.csv", "gain"),
    ],
)
def test_a_wrong_command_would_be_caught(
    line: str, complaint: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (words,) = commands(line)
    with pytest.raises(SystemExit, match=complaint):
        parse(words[1:], monkeypatch)


def test_targets_and_scripts_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for words in unique_commands("make"):
        assert {word for word in words[1:] if "=" not in word} <= targets, words
    for words in unique_commands("python"):
        assert (ROOT / words[1]).is_file(), words


def test_nothing_else_is_typed() -> None:
    programs = {words[0] for block in all_blocks("bash") for words in commands(block.text)}
    assert programs <= {"thalweg", "make", "python", "pip"}


@pytest.mark.parametrize("block", PYTHON, ids=lambda block: f"{block.page}:{block.text[:30]!r}")
def test_python_compiles_and_its_imports_resolve(block: Any) -> None:
    tree = ast.parse(block.text)
    compile(tree, block.page, "exec")
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                importlib.import_module(alias.name)
        elif isinstance(node, ast.ImportFrom):
            module = importlib.import_module(str(node.module))
            for alias in node.names:
                assert hasattr(module, alias.name), f"{block.page}: {node.module} has no {alias.name}"


def test_yaml_blocks_parse() -> None:
    for block in all_blocks("yaml"):
        assert isinstance(yaml.safe_load(block.text), dict), block


def test_navigation_lists_every_page() -> None:
    listed = re.findall(r"\S+\.md", (ROOT / "mkdocs.yml").read_text().split("nav:")[1])
    assert sorted(listed) == sorted(p.relative_to(ROOT / "docs").as_posix() for p in PAGES[1:])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text()
    assert text.count("```") == 2 * len(blocks(page)), "a fence that the tests cannot read"
    for link in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", text)):
        if not link.startswith("http"):
            target, _, anchor = link.partition("#")
            path = page.parent / target if target else page
            assert path.exists(), link
            if anchor:
                headings = re.findall(r"^#+ (.*)$", FENCE.sub("", path.read_text()), re.MULTILINE)
                slugs = [re.sub(r"[^\w-]", "", heading.lower().replace(" ", "-")) for heading in headings]
                assert anchor in slugs, link
