"""GenEval: the golden verdicts, the rules of filtering, relations of boxes, tables by task."""

import json
import math
from typing import Any

import pytest
from golden import golden_files, golden_roots

from thalweg.diffusion.metrics.boxes import iou, relative_position
from thalweg.diffusion.metrics.geneval import (
    COLORS,
    TAGS,
    Rules,
    by_tag,
    kept_indices,
    score_image,
    task_table,
)

GOLDEN = json.loads(golden_files("nft", "geneval.json")[0].read_text())
CASES = {case["case"]: case for case in GOLDEN["cases"]}
EXACT = {"rel": 1e-9, "abs": 1e-12}


def dog(score: float = 0.95, x: float = 0.0, **more: Any) -> dict[str, Any]:
    return {"box": [x, 0.0, x + 10, 10.0], "score": score, **more}


def judge(name: str, **options: Any) -> Any:
    return score_image(CASES[name]["metadata"], CASES[name]["detections"], **options)


def test_every_folder_of_golden_data_has_the_same_cases() -> None:
    for root in golden_roots("nft"):
        other = {case["case"]: case for case in json.loads((root / "geneval.json").read_text())["cases"]}
        assert other.keys() == CASES.keys()
        for name, case in other.items():
            assert {**case["expected"], "official": None} == {**CASES[name]["expected"], "official": None}
    assert len(CASES) == 117


@pytest.mark.parametrize("name", CASES)
def test_verdicts_and_scores_are_the_golden_ones(name: str) -> None:
    expected = CASES[name]["expected"]
    found, quirky = judge(name), judge(name, reference_quirks=True)
    assert (found.correct, found.strict) == (expected["correct"], expected["strict"])
    assert found.score == pytest.approx(expected["score_without_extra_term"], **EXACT)
    assert quirky.score == pytest.approx(expected["score"], **EXACT)
    assert list(quirky.failures) == expected["failures_strict"]
    assert [list(term) for term in quirky.terms] == expected["terms"]
    assert [t for t in quirky.terms if t[0] != "extra"] == list(found.terms)
    assert found.reason == expected["reason_strict"]
    assert found.reason_correct == expected["reason_correct"]


@pytest.mark.parametrize("name", CASES)
def test_what_is_kept_of_the_detections_is_golden(name: str) -> None:
    case = CASES[name]
    assert kept_indices(case["detections"], case["metadata"]["tag"], Rules()) == case["expected"]["kept"]


def test_the_settings_are_the_golden_ones() -> None:
    rules, settings = Rules(), GOLDEN["settings"]
    assert rules.threshold == settings["threshold"]
    assert rules.counting_threshold == settings["counting_threshold"]
    assert rules.max_per_class == settings["max_per_class"]
    assert rules.position_threshold == settings["position_threshold"]
    assert list(COLORS) == settings["colors"]


@pytest.mark.parametrize("case", GOLDEN["relative_position"], ids=lambda c: c["note"] or str(c["a"]))
def test_relations_of_boxes(case: dict[str, Any]) -> None:
    assert sorted(relative_position(case["a"], case["b"])) == case["relations"]


@pytest.mark.parametrize("case", GOLDEN["iou"], ids=lambda c: f"{c['a']}-{c['b']}")
def test_overlaps_of_boxes(case: dict[str, Any]) -> None:
    assert iou(case["a"], case["b"]) == pytest.approx(case["iou"], **EXACT)
    assert iou(case["b"], case["a"]) == pytest.approx(case["iou"], **EXACT)


def test_relations_are_opposite_from_the_other_side() -> None:
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    for case in GOLDEN["relative_position"]:
        there = relative_position(case["a"], case["b"])
        assert {opposite[r] for r in there} == relative_position(case["b"], case["a"])


def test_tables_by_task_are_the_golden_ones() -> None:
    verdicts = [judge(name) for name in CASES]
    tags = [case["metadata"]["tag"] for case in CASES.values()]
    summary = GOLDEN["summary"]
    correct, strict = (task_table([v[key] for v in verdicts], tags) for key in ("correct", "strict"))
    assert correct.means == pytest.approx(summary["tag_accuracy"], **EXACT)
    assert strict.means == pytest.approx(summary["tag_strict"], **EXACT)
    assert correct.counts == summary["counts"]
    assert correct.macro == pytest.approx(summary["mean_of_tags"], **EXACT)
    assert correct.micro == pytest.approx(summary["mean_of_images"], **EXACT)


def test_a_batch_with_placeholders_is_the_golden_one() -> None:
    batch = GOLDEN["batch"]
    verdicts = [judge(name, reference_quirks=True) for name in batch["cases"]]
    tags = [CASES[name]["metadata"]["tag"] for name in batch["cases"]]
    assert [v.score for v in verdicts] == pytest.approx(batch["score"], **EXACT)
    for key, attribute in (("accuracy", "correct"), ("strict_accuracy", "strict")):
        values = [float(v[attribute]) for v in verdicts]
        assert values == batch[key]
        assert by_tag(values, tags, absent=-10.0) == batch[f"{key}_by_tag"]
        assert all(math.isnan(row[0]) for tag, row in by_tag(values, tags).items() if tag != tags[0])


def test_nms_drops_the_worse_of_two_detections_on_one_object_where_it_is_asked_for() -> None:
    metadata = {"tag": "single_object", "include": [{"class": "dog", "count": 1}]}
    twice = {"dog": [dog(0.6), dog(0.97)]}
    assert not score_image(metadata, twice).strict
    assert kept_indices(twice, "single_object", Rules(nms=0.5)) == {"dog": [1]}
    assert score_image(metadata, twice, rules=Rules(nms=0.5)).strict
    apart = {"dog": [dog(0.6), dog(0.97, x=50.0)]}
    assert not score_image(metadata, apart, rules=Rules(nms=0.5)).strict


def test_of_equal_scores_the_later_detection_comes_first() -> None:
    assert kept_indices({"dog": [dog(), dog(), dog(0.99)]}, "counting", Rules()) == {"dog": [2, 1, 0]}


def test_clipped_counts_are_never_negative_and_change_nothing_else() -> None:
    assert judge("single_twenty_found").score == -14.0
    assert judge("single_twenty_found", clip_counts=True).score == 0.0
    for name, case in CASES.items():
        if min((value for _, value in case["expected"]["terms"]), default=0.0) >= 0:
            assert judge(name, clip_counts=True) == judge(name)


def test_a_wrong_position_costs_a_third_and_with_the_quirk_a_quarter() -> None:
    assert judge("pos_left_of_wrong").score == pytest.approx(2 / 3)
    assert judge("pos_left_of_wrong", reference_quirks=True).score == pytest.approx(3 / 4)


def test_a_score_reads_like_a_mapping() -> None:
    found = judge("color_wrong")
    assert dict(found)["score"] == found["score"] == found.score == 0.5
    with pytest.raises(KeyError):
        found["rank"]


def test_a_picture_without_detections_never_fits_and_arguments_are_left_alone() -> None:
    for case in CASES.values():
        if case["metadata"]["include"]:
            assert not score_image(case["metadata"], {}).correct
    case = json.loads(json.dumps(CASES["pos_chain_broken"]))
    score_image(case["metadata"], case["detections"])
    assert case == CASES["pos_chain_broken"]


ITEM = {"class": "dog", "count": 1}


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"tag": "texture", "include": [ITEM]}, "'texture', allowed: single_object"),
        ({"include": [ITEM]}, "without 'tag'"),
        ({"tag": "colors"}, "without 'include'"),
        ({"tag": "counting", "include": [{"class": "dog", "count": 0}]}, "count 0 of 'dog'"),
        ({"tag": "position", "include": [ITEM, {**ITEM, "position": ["near", 0]}]}, "'near' is unknown"),
        ({"tag": "position", "include": [{**ITEM, "position": ["above", 0]}]}, "refers to item 0"),
        ({"tag": "colors", "include": [{**ITEM, "color": "red"}]}, "no 'color'"),
    ],
)
def test_bad_metadata_is_named(metadata: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        score_image(metadata, {"dog": [dog()]})


def test_tables_need_as_many_tags_as_values() -> None:
    with pytest.raises(ValueError, match="0 values and 0 tags"):
        task_table([], [])
    with pytest.raises(ValueError, match="2 values and 1 tags"):
        task_table([1, 0], [TAGS[0]])
    table = task_table([1, 0, 1], ["colors", "colors", "position"])
    assert (table.macro, table.micro) == (pytest.approx(0.75), pytest.approx(2 / 3))
