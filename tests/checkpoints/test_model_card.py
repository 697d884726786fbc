"""Model cards: front matter that reads back, filled templates, no paths of the author's machine."""

import pytest
from huggingface_hub import ModelCard

from thalweg.checkpoints.model_card import Card, read_front_matter, render, templates

FIELDS = {"channels_in": 4, "channels_out": 4, "resolution": 128, "class_path": "thalweg.x.Net"}
FIELDS |= {"import": "from x import P", "pipeline": "P", "arguments": "batch_size=4, ", "classes": "cat, dog"}
FIELDS |= {"max_sequence_length": 0, "words_most": 10, "words": "a, fox"}
FIELDS |= {"load": 'load("org/scot-t")', "rewards": "- shapes"}
CARD = Card(
    name="scOT T",
    repo="org/scot-t",
    license="apache-2.0",
    summary="21 M parameters.",
    tags=("pde", "operator-learning"),
    datasets=("NS-Sines", "CE-RP"),
    metrics=("relative L1",),
    errors={"NS-Sines": {"median relative L1": 0.012345}, "CE-RP": {"mean relative L1": 1.0}},
    provenance={"step": 100},
    config={"data": {"data_dir": "/home/someone/secret/pdegym", "seed": 0}, "lr": 5e-4},
    fields=FIELDS,
)


@pytest.mark.parametrize("template", templates())
def test_every_template_is_filled(template: str) -> None:
    text = render(template, CARD)
    assert "$" not in text
    for part in ("# scOT T", "21 M parameters.", '"org/scot-t"', "- NS-Sines", "- step: 100", "seed: 0"):
        assert part in text


@pytest.mark.parametrize("template", templates())
def test_front_matter_is_what_the_hub_reads(template: str) -> None:
    text = render(template, CARD)
    data = ModelCard(text).data
    assert (data.license, data.library_name, data.datasets) == (
        "apache-2.0",
        "thalweg",
        ["NS-Sines", "CE-RP"],
    )
    assert read_front_matter(text)["tags"] == ["pde", "operator-learning"]
    assert "base_model" not in read_front_matter(text)


def test_errors_become_a_table_with_gaps() -> None:
    lines = render("poseidon", CARD).splitlines()
    start = lines.index("| data | median relative L1 | mean relative L1 |")
    assert lines[start + 2 : start + 4] == ["| NS-Sines | 0.01235 |  |", "| CE-RP |  | 1 |"]


def test_what_is_not_known_is_said() -> None:
    bare = Card(name="x", repo="x", license="other", summary="s", fields=FIELDS)
    assert render("poseidon", bare).count("Not stated.") == 4


def test_absolute_paths_lose_their_folders() -> None:
    text = render("network", CARD)
    assert "someone" not in text
    assert "data_dir: pdegym" in text


def test_unknown_template_and_missing_place_are_named() -> None:
    with pytest.raises(
        ValueError, match="card template 'posidon' is unknown, allowed: captioned, network, pipe"
    ):
        render("posidon", CARD)
    with pytest.raises(ValueError, match="needs a value for 'class_path'"):
        render("network", Card(name="x", repo="x", license="mit", summary="s"))


@pytest.mark.parametrize(
    "text", ["", "no front matter", "---\n", "---\nunclosed: 1\n", "text\n---\na: 1\n---\n"]
)
def test_cards_without_front_matter_have_none(text: str) -> None:
    assert read_front_matter(text) == {}
