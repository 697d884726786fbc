"""Names, sizes, optimizer groups and files: what makes published checkpoints load."""

from pathlib import Path

import pytest
import torch
from golden import golden_files
from golden_scot import CASES, read_json
from safetensors.torch import save_file

from thalweg.core_optim.config import OptimConfig
from thalweg.core_optim.groups import parameter_groups
from thalweg.pde.poseidon import ScOT, ScOTConfig
from thalweg.pde.poseidon.groups import freeze_latent, group_rules
from thalweg.pde.poseidon.pretrained import replace_embedding_recovery

RESIDUAL = CASES["learn_residual"]
T_LIKE = ScOTConfig.preset("T", image_size=64, embed_dim=6, num_heads=(1, 2, 4, 8))


def on_meta(config: ScOTConfig) -> ScOT:
    with torch.device("meta"):
        return ScOT(config)


@pytest.mark.parametrize(
    ("size", "parameters", "tensors"),
    [
        ("T", 20_774_444, 844),
        ("S", 39_901_076, 1580),
        ("B", 157_729_988, 1580),
        ("L", 628_575_524, 1580),
    ],
)
def test_published_sizes(size: str, parameters: int, tensors: int) -> None:
    model = on_meta(ScOTConfig.preset(size))
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert len(model.state_dict()) == tensors
    assert sum(v.numel() for v in model.state_dict().values()) == parameters


@pytest.mark.parametrize("path", golden_files("poseidon", "keys_*.json"), ids=lambda p: p.stem)
def test_published_names_and_shapes(path: Path) -> None:
    model = on_meta(ScOTConfig.preset(path.stem.removeprefix("keys_")))
    assert {name: list(value.shape) for name, value in model.state_dict().items()} == read_json(path)


@pytest.mark.parametrize("network", ["T", "unconditioned"])
@pytest.mark.parametrize("setting", ["both", "embedding_recovery_only", "time_embedding_only", "none"])
def test_optimizer_groups(network: str, setting: str) -> None:
    (path,) = golden_files("poseidon", f"param_groups_{network}.json")
    golden = read_json(path)
    config = (
        ScOTConfig.preset("T") if network == "T" else ScOTConfig.from_json(CASES[network] / "config.json")
    )
    rates = {
        "lr_embedding_recovery": 5e-4 if setting in ("both", "embedding_recovery_only") else None,
        "lr_time_embedding": 3e-4 if setting in ("both", "time_embedding_only") else None,
    }
    groups = parameter_groups(on_meta(config), OptimConfig(), group_rules(5e-5, 1e-6, **rates))
    column = golden["settings"].index(setting)
    assigned = {name: group["name"] for group in groups for name in group["param_names"]}
    assert assigned == {name: groups_of[column] for name, groups_of in golden["assignment"].items()}
    lr = {"embedding_recovery": 5e-4, "time_embedding": 3e-4}
    for group in groups:
        assert group["lr"] == lr.get(group["name"], 5e-5)
        assert group["weight_decay"] == (1e-6 if golden["decay"][group["name"]] else 0.0)


def test_groups_do_not_depend_on_a_prefix() -> None:
    rules = group_rules(1e-3, 0.1, 1e-2, 1e-4)
    bare, wrapped = on_meta(T_LIKE), torch.nn.ModuleDict({"network": on_meta(T_LIKE)})
    sizes = [
        {g["name"]: len(g["params"]) for g in parameter_groups(m, OptimConfig(), rules)}
        for m in (bare, wrapped)
    ]
    assert sizes[0] == sizes[1]


def test_frozen_latent_leaves_embedding_recovery_and_time() -> None:
    model = on_meta(ScOTConfig.preset("T"))
    names = freeze_latent(model)
    assert names == [n for n, p in model.named_parameters() if p.requires_grad]
    # Embedding and recovery (9 tensors) and the other conditional norms (304).
    assert len(names) == 313
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 6_788 + 52_800


@pytest.mark.parametrize("record", range(5))
def test_replacing_embedding_and_recovery_draws_what_the_reference_draws(record: int, tmp_path: Path) -> None:
    (path,) = golden_files("poseidon", "replace_embedding.json")
    golden = read_json(path)[record]
    config = T_LIKE
    if golden["checkpoint"] == "unconditioned":
        config = ScOTConfig.from_json(CASES["unconditioned"] / "config.json")
    ScOT(config).save_pretrained(tmp_path)
    before = ScOT.from_pretrained(tmp_path).state_dict()
    model = ScOT.from_pretrained(tmp_path, replace_embedding_recovery=True, **golden["config_changes"])
    after = model.state_dict()
    assert after.keys() == before.keys()
    changed = {
        name: list(value.shape)
        for name, value in after.items()
        if value.shape != before[name].shape or not torch.equal(value, before[name])
    }
    assert changed == golden["reinitialised"]
    assert all(value.isfinite().all() for value in after.values())
    x = torch.randn(1, model.config.num_channels, *model.config.image_shape)
    assert model(x, torch.ones(1)).output.shape[1] == golden["config_changes"]["num_out_channels"]


@pytest.mark.parametrize(("init", "std"), [("normal", 0.02), ("default", (1 / (3 * 4 * 2 * 2)) ** 0.5)])
def test_fresh_layers_have_the_spread_of_their_initialisation(init: str, std: float) -> None:
    model = ScOT.from_pretrained(RESIDUAL).requires_grad_(False)
    names = replace_embedding_recovery(
        model, 4, 4, channel_slices=(0, 1, 3, 4), init=init, reset_matching=True
    )
    assert len(names) == 5
    weight = model.embeddings.patch_embeddings.projection.weight
    assert weight.std().item() == pytest.approx(std, rel=0.15)
    assert not weight.requires_grad


def test_changed_channels_need_permission_and_loss_groups() -> None:
    with pytest.raises(ValueError, match="replace_embedding_recovery=True"):
        ScOT.from_pretrained(RESIDUAL, num_channels=4)
    with pytest.raises(ValueError, match="channel_slice_list_normalized_loss"):
        ScOT.from_pretrained(RESIDUAL, num_out_channels=2, replace_embedding_recovery=True)
    with pytest.raises(ValueError, match="channel_slices"):
        replace_embedding_recovery(ScOT.from_pretrained(RESIDUAL), 5, 2)
    with pytest.raises(ValueError, match=r"did you mean.*num_channels"):
        ScOT.from_pretrained(RESIDUAL, num_chanels=4)


def test_weights_of_another_architecture_are_refused() -> None:
    with pytest.raises(ValueError, match="missing"):
        ScOT.from_pretrained(RESIDUAL, depths=(2, 2))
    with pytest.raises(ValueError, match="missing"):
        ScOT.from_pretrained(RESIDUAL, use_conditioning=False)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_older_names_extra_tables_and_prefixes_load(suffix: str, tmp_path: Path) -> None:
    model = ScOT.from_pretrained(RESIDUAL)
    state = {
        f"module.{name.replace('residual_blocks.0.0.weight', 'residual_blocks.0.0.gamma')}": value
        for name, value in model.state_dict().items()
    }
    assert "module.residual_blocks.0.0.gamma" in state
    state["module.encoder.layers.0.blocks.0.attention.self.relative_coords_table"] = torch.zeros(1, 15, 15, 2)
    (tmp_path / "config.json").write_text(
        (RESIDUAL / "config.json").read_text().replace("ScOT", "SwinForPDE")
    )
    if suffix == "bin":
        torch.save(state, tmp_path / "pytorch_model.bin")
    else:
        save_file(state, tmp_path / "model.safetensors")
    loaded = ScOT.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in model.state_dict().items())


def test_saving_and_loading_returns_the_network(tmp_path: Path) -> None:
    model = ScOT(T_LIKE.replace(image_size=(32, 64), use_mask_token=True, drop_path_rate=0.2))
    model.save_pretrained(tmp_path / "a" / "b")
    loaded = ScOT.from_pretrained(tmp_path / "a" / "b")
    assert loaded.config == model.config
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters()))
    assert loaded.training


def test_fresh_weights_follow_the_reference() -> None:
    model = ScOT(ScOTConfig.preset("T", depths=(1, 1, 1, 1)))
    state = model.state_dict()
    assert state["encoder.layers.2.blocks.0.intermediate.dense.weight"].std() == pytest.approx(0.02, rel=0.02)
    assert state["residual_blocks.1.0.dwconv.weight"].std() == pytest.approx(0.02, rel=0.1)
    assert state["encoder.layers.0.blocks.0.layernorm_after.weight.weight"].std() < 0.04
    assert not state["encoder.layers.2.blocks.0.intermediate.dense.bias"].any()
    assert torch.equal(state["residual_blocks.0.0.weight"], torch.full((48,), 1e-6))
    assert state["encoder.layers.0.blocks.0.attention.self.logit_scale"].exp() == pytest.approx(
        torch.full((3, 1, 1), 10.0)
    )
    # The transposed convolution keeps torch's default, uniform with bound 1/sqrt(4 * 4 * 4).
    assert state["patch_recovery.projection.weight"].abs().max() == pytest.approx(0.125, rel=0.01)
