"""Captions as numbers, and as the tokenizer of an exported pipeline has them."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from thalweg.diffusion.metrics.geneval import TAGS
from thalweg.diffusion.shapes.captions import WORDS, prompts
from thalweg.diffusion.vocabulary import END, PAD, START, UNKNOWN, Vocabulary, words_of

SHAPES = Vocabulary(words=WORDS[1:])


def test_the_tokenizer_says_the_same_of_every_caption_of_shapesworld(tmp_path: Path) -> None:
    SHAPES.tokenizer().save_pretrained(tmp_path)
    captions = ["", *(metadata["prompt"] for tag in TAGS for metadata in prompts(tag))]
    told = AutoTokenizer.from_pretrained(tmp_path)(captions, padding="max_length", max_length=SHAPES.length)
    assert told.input_ids == [SHAPES.ids(caption) for caption in captions]
    assert AutoTokenizer.from_pretrained(tmp_path).model_max_length == SHAPES.length


def test_a_caption_is_start_words_end_and_padding() -> None:
    assert Vocabulary(words=("a", "fox"), length=6).ids("A fox") == [START, 4, 5, END, PAD, PAD]
    assert Vocabulary(words=("a",), length=3).ids("") == [START, END, PAD]


def test_unknown_words_are_refused_in_training_and_mean_unknown_in_pipelines() -> None:
    with pytest.raises(ValueError, match=r"words \['fox'\] of 'a fox' are unknown, allowed: a, and, two"):
        SHAPES.ids("a fox")
    assert SHAPES.tokenizer()("a fox").input_ids == [START, 4, UNKNOWN, END]


def test_long_captions_are_refused_in_training_and_cut_in_pipelines() -> None:
    two = Vocabulary(words=("a", "b", "c"), length=4)
    with pytest.raises(ValueError, match="'a b c' has 3 words, allowed: at most 2"):
        two.ids("a b c")
    assert two.tokenizer()("a b c", truncation=True).input_ids == [START, 4, 5, END]


@pytest.mark.parametrize(
    "caption", ["A red circle.", "a red, circle", " a\nred\tcircle!?", '"a red" (circle)']
)
def test_signs_are_left_out_by_both(caption: str) -> None:
    assert SHAPES.ids(caption) == SHAPES.ids("a red circle")
    assert SHAPES.tokenizer()(caption).input_ids == SHAPES.ids("a red circle")[:5]


@pytest.mark.parametrize("words", [("a", "a"), ("A",), ("",), ("a b",), ("<unk>",), ("fox.",)])
def test_words_are_different_and_in_lower_case(words: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="allowed: different ones in lower case"):
        Vocabulary(words=words)


def test_words_of_captions_are_sorted() -> None:
    assert words_of(["a Red fox.", "the fox's"]) == ("a", "fox", "red", "s", "the")
