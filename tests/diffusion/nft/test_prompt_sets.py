"""Sets of prompts: files, their faults, and the grammar of GenEval."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from golden_nft import cases

from thalweg.diffusion.metrics.geneval import COLORS, TAGS, score_image
from thalweg.diffusion.nft.prompt_sets import (
    CLASSES,
    GRAMMAR,
    TRAIN_WEIGHTS,
    Prompt,
    article,
    geneval_prompts,
    plural,
    read_prompts,
    to_jsonl,
)
from thalweg.diffusion.shapes import captions

SEED = 43


def test_text_files_have_a_prompt_per_line(tmp_path: Path) -> None:
    path = tmp_path / "train.txt"
    path.write_text('\ufeffa sign that says "Öl"\n\n  two dogs \r\na "x"', encoding="utf-8")
    assert [prompt.text for prompt in read_prompts(path)] == ['a sign that says "Öl"', "two dogs", 'a "x"']


def test_geneval_files_keep_their_metadata(tmp_path: Path) -> None:
    """Golden ones, those of ShapesWorld, and drawn ones."""
    golden = [case["metadata"] for _, case in cases("geneval")]
    shapes = [captions.prompts(tag)[0] for tag in TAGS]
    drawn = geneval_prompts(50, seed=SEED)
    everything = [*golden, *shapes, *(prompt.metadata for prompt in drawn)]
    everything = [values for values in everything if "prompt" in values and values["include"]]
    path = tmp_path / "train_metadata.jsonl"
    path.write_text(to_jsonl([Prompt(text="", metadata=values) for values in everything]))
    found = read_prompts(path)
    assert [prompt.metadata for prompt in found] == everything
    assert [prompt.text for prompt in found] == [values["prompt"] for values in everything]
    assert len(everything) > 60


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "", "has no prompts"),
        ("a.txt", " \n\n", "has no prompts"),
        ("a.jsonl", "\n", "has no prompts"),
        ("a.csv", "x", r"is \.csv, allowed: \.txt, \.jsonl"),
        ("a.jsonl", '{"prompt": "a"', "line 1: not JSON"),
        ("a.jsonl", '{"tag": "colors"}', "line 1: needed is an object with a text 'prompt'"),
        ("a.jsonl", '{"prompt": "a"}', "line 1: metadata of GenEval without 'tag'"),
        ("a.jsonl", '{"prompt": "a", "tag": "colors", "include": []}', "line 1: include is empty"),
        ("a.jsonl", '\n{"prompt": "a", "tag": "colour", "include": []}', "line 2: .*no task 'colour'"),
    ],
)
def test_faults_name_the_file_and_the_line(name: str, text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ValueError, match=f"{path}.*{message}"):
        read_prompts(path)


def test_missing_and_binary_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        read_prompts(tmp_path / "a.txt")
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not UTF-8"):
        read_prompts(tmp_path / "a.txt")


def test_golden_metadata_is_in_the_grammar() -> None:
    """Classes, and words: some golden metadata ask for more than their prompts say."""
    golden = [case["metadata"] for _, case in cases("geneval")]
    assert {item["class"] for values in golden for item in values["include"]} <= set(CLASSES)
    assert len(set(CLASSES)) == 80
    for tag in ("single_object", "two_object", "colors", "position", "color_attr"):
        told = [values for values in golden if values["tag"] == tag and "prompt" in values]
        assert sum(rebuilt(values) == values["prompt"] for values in told) > len(told) / 2, tag


def rebuilt(values: dict[str, Any]) -> str:
    """The words that metadata stands for."""
    named = [
        f"{article(item['color'])} {item['class']}" if "color" in item else article(item["class"])
        for item in values["include"]
    ]
    if values["tag"] == "counting":
        (item,) = values["include"]
        return f"a photo of {['two', 'three', 'four'][item['count'] - 2]} {plural(item['class'])}"
    if values["tag"] == "position":
        return f"a photo of {named[1]} {values['include'][1]['position'][0]} {named[0]}"
    return f"a photo of {' and '.join(named)}"


@pytest.mark.parametrize("tag", list(GRAMMAR))
def test_prompts_say_what_their_metadata_asks_for(tag: str) -> None:
    for prompt in geneval_prompts(200, seed=SEED, weights={tag: 1.0}):
        values = dict(prompt.metadata)
        assert prompt.text == values["prompt"] == rebuilt(values)
        names = [item["class"] for item in values["include"]]
        colors = [item["color"] for item in values["include"] if "color" in item]
        assert len(set(names)) == len(names)
        assert len(set(colors)) == len(colors) == {"colors": 1, "color_attr": 2}.get(tag, 0)
        assert not ("person" in names and colors)
        assert set(colors) <= set(COLORS)
        if tag == "counting":
            assert values["exclude"] == [{"class": names[0], "count": values["include"][0]["count"] + 1}]
        json.dumps(values)
        assert not score_image(values, {}).correct


def test_words_are_those_of_geneval() -> None:
    assert [article(word) for word in ("apple", "orange", "bus", "umbrella")] == [
        "an apple", "an orange", "a bus", "an umbrella",
    ]  # fmt: skip
    assert [plural(word) for word in ("bus", "dog", "wine glass")] == ["buses", "dogs", "wine glasses"]


def test_training_prompts_have_the_published_mixture() -> None:
    count = 17_000
    drawn = Counter(prompt.metadata["tag"] for prompt in geneval_prompts(count, seed=SEED))
    for tag, weight in TRAIN_WEIGHTS.items():
        share = weight / 1.7
        assert abs(drawn[tag] / count - share) < 4 * (share * (1 - share) / count) ** 0.5, tag
    assert "single_object" not in drawn


def test_drawing_depends_on_the_seed_and_leaves_test_prompts_out() -> None:
    test = {prompt.text for prompt in geneval_prompts(2000, seed=1)}
    train = geneval_prompts(2000, seed=2, exclude=test)
    assert not test & {prompt.text for prompt in train}
    assert train == geneval_prompts(2000, seed=2, exclude=test)
    assert train != geneval_prompts(2000, seed=3, exclude=test)


def test_bad_mixtures_are_refused() -> None:
    with pytest.raises(ValueError, match="no task 'colour', allowed: single_object"):
        geneval_prompts(1, seed=0, weights={"colour": 1.0})
    with pytest.raises(ValueError, match="allowed: 0 and more, and not all 0"):
        geneval_prompts(1, seed=0, weights={"colors": 0.0})
    every = {f"a photo of {article(name)}" for name in CLASSES}
    with pytest.raises(ValueError, match="task 'single_object' in turn are excluded"):
        geneval_prompts(1, seed=0, weights={"single_object": 1.0}, exclude=every)
