"""Key maps: order, reports, collisions, and the way back; the scOT rules against the real key tree."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thalweg.checkpoints.keymap import Drop, KeyMap, Rename
from thalweg.checkpoints.maps.poseidon import MAP, RULES

PREFIXES = ("module.", "model.", "network.", "swinv2.", "_orig_mod.")
BLOCK = (
    "attention.self.logit_scale",
    "attention.self.continuous_position_bias_mlp.0.weight",
    "attention.self.query.bias",
    "layernorm_before.weight.weight",
    "output.dense.weight",
)
canonical = st.one_of(
    st.builds("{}.layers.{}.blocks.{}.{}".format, st.sampled_from(("encoder", "decoder")), st.integers(0, 3),
              st.integers(0, 7), st.sampled_from(BLOCK)),
    st.builds("residual_blocks.{}.{}.{}".format, st.integers(0, 2), st.integers(0, 1),
              st.sampled_from(("weight", "dwconv.weight", "norm.weight.bias", "pwconv1.bias"))),
    st.sampled_from(("embeddings.norm.weight.weight", "patch_recovery.mixup.weight")),
)  # fmt: skip


def test_rules_apply_in_order() -> None:
    keys = KeyMap([Rename(pattern="^a", to="b"), Rename(pattern="^b", to="c")])
    assert keys.apply({"a": 1, "d": 2})[0] == {"c": 1, "d": 2}
    assert KeyMap(keys.rules[::-1]).apply({"a": 1})[0] == {"b": 1}


def test_report_tells_renamed_dropped_and_unmatched() -> None:
    keys = KeyMap([Drop(pattern="table$", reason="recomputed"), Rename(pattern="^m\\.", to="")])
    mapped, report = keys.apply({"m.x": 1, "m.table": 2, "y": 3})
    assert mapped == {"x": 1, "y": 3}
    assert report.renamed == {"m.x": "x"}
    assert report.dropped == {"m.table": "recomputed"}
    assert report.unmatched == ("y",)
    lines = report.summary().splitlines()
    assert lines[0] == "2 tensors kept, 1 of them renamed, 1 dropped"
    assert "  renamed without prefix 'm.': 1, e.g. m.x -> x" in lines
    assert "  dropped m.table: recomputed" in lines


def test_two_names_for_one_tensor_are_an_error_and_visible_beforehand() -> None:
    keys = KeyMap([Rename(pattern="^(a|b)$", to="c")])
    assert keys.trace(["a", "b", "d"]).collisions == {"c": ("a", "b")}
    with pytest.raises(ValueError, match="a and b would both become 'c'"):
        keys.apply({"a": 1, "b": 2})


def test_inverse_holds_the_steps_that_can_be_undone() -> None:
    assert MAP.inverse().rules == (
        Rename(pattern=RULES[2].back[0], to=RULES[2].back[1], back=(RULES[2].pattern, RULES[2].to)),
    )
    assert MAP.one_way == (RULES[0], RULES[1], RULES[3])


@settings(deadline=None)
@given(names=st.sets(canonical, min_size=1))
def test_scot_names_go_out_in_the_old_layout_and_come_back(names: set[str]) -> None:
    state = {name: i for i, name in enumerate(sorted(names))}
    old, report = MAP.inverse().apply(state)
    assert all(target.endswith(".gamma") for target in report.renamed.values())
    assert MAP.apply(old)[0] == state
    assert MAP.inverse().inverse().apply(old)[0] == state


@settings(deadline=None)
@given(names=st.sets(canonical, min_size=1), prefix=st.lists(st.sampled_from(PREFIXES), max_size=3))
def test_scot_prefixes_are_stripped_in_any_nesting(names: set[str], prefix: list[str]) -> None:
    wrapped = {"".join(prefix) + name: name for name in names}
    mapped, report = MAP.apply(wrapped)
    assert mapped == {name: name for name in names}
    assert len(report.renamed) == (len(names) if prefix else 0)


@settings(deadline=None)
@given(names=st.sets(canonical, min_size=1))
def test_scot_map_leaves_canonical_names_alone(names: set[str]) -> None:
    assert MAP.trace(names).unmatched == tuple(names)


def test_scot_rules_on_particular_names() -> None:
    mapped, report = MAP.apply(
        {
            "model.residual_blocks.0.1.gamma": 0,
            "model.encoder._orig_mod.layers.1.blocks.0._orig_mod.output.dense.bias": 1,
            "model.encoder.layers.0.blocks.0.attention.self.relative_coords_table": 2,
            "model.encoder.layers.0.blocks.0.attention.self.relative_position_index": 3,
            "residual_blocks.0.1.norm.gamma": 4,
        }
    )
    assert mapped == {
        "residual_blocks.0.1.weight": 0,
        "encoder.layers.1.blocks.0.output.dense.bias": 1,
        "residual_blocks.0.1.norm.gamma": 4,
    }
    assert len(report.dropped) == 2
    assert "gamma to weight" in report.summary()
