"""Fit, export, load again: equal bit for bit; published layouts come in; a push sends the folder."""

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import huggingface_hub.constants
import lightning as L
import pytest
import torch
from golden import golden_files
from hubserver import write_cache
from lightning.pytorch.callbacks import ModelCheckpoint
from poseidon_runs import SCOT
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from thalweg.apps.build import build_network, load_network
from thalweg.apps.callbacks import EMA
from thalweg.apps.cli import main
from thalweg.apps.export import export, import_
from thalweg.checkpoints.maps.poseidon import MAP
from thalweg.checkpoints.model_card import read_front_matter
from thalweg.checkpoints.tensors import load, save
from thalweg.pde.poseidon import ScOT

pytestmark = [
    pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)`:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]
UNET = {
    "class_path": "thalweg.pde.baselines.unet.UNetOperator",
    "init_args": {"config": {"num_channels": 2, "num_out_channels": 2}},
}
FNO = {
    "class_path": "thalweg.pde.baselines.fno.FNOOperator",
    "init_args": {"config": {"num_channels": 2, "num_out_channels": 2, "modes": 4, "width": 4, "depth": 1}},
}
X, T = torch.randn(4, 2, 16, 16, generator=torch.Generator().manual_seed(0)), torch.linspace(0, 1, 4)


def app_config(network: dict[str, Any]) -> dict[str, Any]:
    return {
        "model": {
            "class_path": "thalweg.pde.poseidon.module.PoseidonModule",
            "init_args": {"network": network, "optim": {"lr": 1e-3}, "pretrained": "hf://org/base@v1"},
        },
        "data": {
            "class_path": "thalweg.pde.data.datamodule.PDEDataModule",
            "init_args": {"datasets": ["NS-Sines", {"name": "CE-RP"}], "data_dir": "/home/me/pdegym"},
        },
    }


class Module(L.LightningModule):
    """A network in training, with the configuration that the command line would embed."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.app_config = config
        self.network = build_network(config)

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        return (self.network(batch[0], batch[1]).output - batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["app_config"] = self.app_config


def fit(folder: Path, network: dict[str, Any], callbacks: list[L.Callback]) -> tuple[nn.Module, Path]:
    """Two steps; with averaging the returned network holds the averaged weights."""
    module = Module(app_config(network))
    trainer = L.Trainer(
        max_steps=2, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=folder, callbacks=[*callbacks, ModelCheckpoint(dirpath=folder, filename="m")],
    )  # fmt: skip
    trainer.fit(module, DataLoader(TensorDataset(X, T), batch_size=2))
    return module.network, folder / "m.ckpt"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    torch.manual_seed(3)
    return fit(tmp_path_factory.mktemp("run"), SCOT, [EMA(decay=0.9)])


def outputs(network: nn.Module) -> Tensor:
    with torch.no_grad():
        return network.eval()(X, T).output


def test_exported_network_equals_the_trained_one_bitwise(run: tuple[nn.Module, Path], tmp_path: Path) -> None:
    trained, ckpt = run
    averaged = ScOT.from_pretrained(str(export(ckpt=ckpt, to=tmp_path / "out")))
    assert torch.equal(outputs(averaged), outputs(trained))
    raw = ScOT.from_pretrained(str(export(ckpt=ckpt, to=tmp_path / "raw", weights="raw")))
    state = torch.load(ckpt, weights_only=True)["current_model_state"]
    for name, value in raw.state_dict().items():
        assert torch.equal(value, state[f"network.{name}"])
    assert not torch.equal(outputs(raw), outputs(averaged))


def test_folder_is_complete_and_tells_nothing_about_the_machine(
    run: tuple[nn.Module, Path], tmp_path: Path
) -> None:
    folder = export(ckpt=run[1], to=tmp_path / "out", license="mit")
    assert sorted(p.name for p in folder.iterdir()) == [
        "README.md", "config.json", "model.safetensors", "provenance.json",
    ]  # fmt: skip
    card = (folder / "README.md").read_text()
    front = read_front_matter(card)
    assert (front["license"], front["datasets"], front["base_model"]) == (
        "mit",
        ["NS-Sines", "CE-RP"],
        "org/base",
    )
    assert 'ScOT.from_pretrained("out")' in card
    provenance = json.loads((folder / "provenance.json").read_text())
    assert (provenance["optimizer steps"], provenance["weights"]) == (2, "exponential moving average")
    assert provenance["app_config"]["data"]["init_args"]["data_dir"] == "pdegym"
    assert len(provenance["sha256"]["model.safetensors"]) == 64
    for text in (card, json.dumps(provenance)):
        assert "/home" not in text
        assert str(tmp_path) not in text


def test_errors_of_an_evaluation_go_into_the_card(run: tuple[nn.Module, Path], tmp_path: Path) -> None:
    result = {
        "dataset": "NS-PwC",
        "metrics": {"normalised": {"scored_median_relative_l1_error": 4.25, "x": 1}},
    }
    (tmp_path / "metrics.json").write_text(json.dumps(result))
    folder = export(ckpt=run[1], to=tmp_path / "out", errors=tmp_path / "metrics.json")
    assert "| NS-PwC | 4.25 |" in (folder / "README.md").read_text()
    (tmp_path / "metrics.json").write_text("{}")
    with pytest.raises(ValueError, match=r"metrics\.json is no result of 'thalweg evaluate'"):
        export(ckpt=run[1], to=tmp_path / "other", errors=tmp_path / "metrics.json")
    assert not (tmp_path / "other").exists()


def test_reduced_precision_is_stored_and_stated(run: tuple[nn.Module, Path], tmp_path: Path) -> None:
    folder = export(ckpt=run[1], to=tmp_path / "out", dtype="bfloat16")
    assert {t.dtype for t in load(folder / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((folder / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert (outputs(ScOT.from_pretrained(str(folder))) - outputs(run[0])).abs().max() < 0.05


def test_complex_weights_keep_their_precision(tmp_path: Path) -> None:
    _, ckpt = fit(tmp_path, FNO, [])
    whole = load(export(ckpt=ckpt, to=tmp_path / "whole") / "model.safetensors")
    half = load(export(ckpt=ckpt, to=tmp_path / "half", dtype="bfloat16") / "model.safetensors")
    kinds = {(whole[name].dtype, value.dtype) for name, value in half.items()}
    assert kinds == {(torch.float32, torch.bfloat16), (torch.complex64, torch.complex64)}
    assert all(torch.equal(whole[name], value) for name, value in half.items() if value.is_complex())


def test_other_networks_are_described_by_their_class(tmp_path: Path) -> None:
    trained, ckpt = fit(tmp_path, UNET, [])
    folder = export(ckpt=ckpt, to=tmp_path / "out")
    assert json.loads((folder / "config.json").read_text()) == UNET
    assert torch.equal(outputs(load_network(folder)), outputs(trained))
    assert "thalweg.pde.baselines.unet.UNetOperator" in (folder / "README.md").read_text()


def test_folder_in_use_is_kept_unless_told_otherwise(run: tuple[nn.Module, Path], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    (tmp_path / "out" / "pytorch_model.bin").write_text("stale")
    with pytest.raises(ValueError, match="is not empty; pass --overwrite"):
        export(ckpt=run[1], to=tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists()
    export(ckpt=run[1], to=tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
    assert not (tmp_path / "out" / "pytorch_model.bin").exists()
    with pytest.raises(ValueError, match=r"notes\.txt is a file"):
        export(ckpt=run[1], to=tmp_path / "out" / "notes.txt")


def test_failure_leaves_no_folder(
    run: tuple[nn.Module, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("thalweg.checkpoints.tensors.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        export(ckpt=run[1], to=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_misfits_and_diverged_weights_are_refused(run: tuple[nn.Module, Path], tmp_path: Path) -> None:
    content = torch.load(run[1], weights_only=True)
    content["state_dict"].pop("network.patch_recovery.mixup.weight")
    torch.save(content, tmp_path / "short.ckpt")
    with pytest.raises(ValueError, match=r"short\.ckpt does not fit ScOT: 1 tensors are missing"):
        export(ckpt=tmp_path / "short.ckpt", to=tmp_path / "out")
    content = torch.load(run[1], weights_only=True)
    content["state_dict"]["network.patch_recovery.projection.bias"].fill_(float("nan"))
    torch.save(content, tmp_path / "nan.ckpt")
    with pytest.raises(ValueError, match=r"nan\.ckpt holds NaN or infinity in 1 tensors"):
        export(ckpt=tmp_path / "nan.ckpt", to=tmp_path / "out")


class Recorder:
    """Stands in for the hub: remembers calls, and fails on demand."""

    calls: list[tuple[str, dict[str, Any]]]
    failure: Exception | None = None

    def __init__(self) -> None:
        type(self).calls = []

    def create_repo(self, repo_id: str, **options: Any) -> str:
        if self.failure:
            raise self.failure
        self.calls.append(("create_repo", {"repo_id": repo_id, **options}))
        return f"https://huggingface.co/{repo_id}"

    def upload_folder(self, **options: Any) -> None:
        names = {path.name for path in Path(options["folder_path"]).iterdir()}
        self.calls.append(("upload_folder", {**options, "names": names}))


def test_push_creates_the_repository_and_sends_the_folder(
    run: tuple[nn.Module, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="cannot push to org/new: offline mode is on"):
        export(ckpt=run[1], to=tmp_path / "out", push="org/new")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "HfApi", Recorder)
    for bad in ("new", "hf://org/new", "org/new@v1"):
        with pytest.raises(ValueError, match=r"ORG/NAME|org/name"):
            export(ckpt=run[1], to=tmp_path / "out", push=bad)
    assert not (tmp_path / "out").exists()
    folder = export(ckpt=run[1], to=tmp_path / "out", push="org/new")
    (first, created), (second, sent) = Recorder.calls
    assert (first, created) == ("create_repo", {"repo_id": "org/new", "exist_ok": True})
    assert (second, sent["repo_id"], sent["folder_path"]) == ("upload_folder", "org/new", folder)
    assert sent["commit_message"] == "ema weights after 2 steps"
    assert sent["names"] == {"README.md", "config.json", "model.safetensors", "provenance.json"}
    assert 'ScOT.from_pretrained("org/new")' in (folder / "README.md").read_text()


def test_failed_push_keeps_the_folder_and_says_how_to_go_on(
    run: tuple[nn.Module, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "HfApi", Recorder)
    monkeypatch.setattr(Recorder, "failure", huggingface_hub.errors.LocalTokenNotFoundError("no token"))
    with pytest.raises(
        ValueError, match=r"not pushed \(no token\): run 'hf auth login', then 'hf upload org/new"
    ):
        export(ckpt=run[1], to=tmp_path / "out", push="org/new")
    assert (tmp_path / "out" / "model.safetensors").is_file()


def published(folder: Path, network: nn.Module) -> dict[str, bytes]:
    """The network as an older program published it: a PyTorch file, gamma names, a prefix, derived tables."""
    old, _ = MAP.inverse().apply(network.state_dict())
    state = {f"model.{name}": value for name, value in old.items()}
    assert any(name.endswith(".gamma") for name in state)
    prefix = "model.encoder.layers.0.blocks.0.attention.self"
    state[f"{prefix}.relative_position_index"] = torch.zeros(4, 4, dtype=torch.int64)
    torch.save(state, folder / "weights.bin")
    config = {**network.config.to_json(), "architectures": ["SwinForPDE"], "transformers_version": "4.29.2"}
    return {
        "config.json": json.dumps(config).encode(),
        "pytorch_model.bin": (folder / "weights.bin").read_bytes(),
        "README.md": b"---\nlicense: cc-by-nc-4.0\n---\n",
    }


def test_published_layout_is_imported_and_reported(
    run: tuple[nn.Module, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    write_cache(tmp_path / "cache", "org/old", published(tmp_path, run[0]))
    folder = import_("hf://org/old", to=tmp_path / "new")
    assert torch.equal(outputs(ScOT.from_pretrained(str(folder))), outputs(run[0]))
    assert (folder / "model.safetensors").is_file()
    card = (folder / "README.md").read_text()
    assert read_front_matter(card)["license"] == "cc-by-nc-4.0"
    assert "imported from: hf://org/old" in card
    report = capsys.readouterr().out
    assert "every tensor fits ScOT" in report
    assert "renamed gamma to weight: 1" in report
    assert "dropped model.encoder.layers.0.blocks.0.attention.self.relative_position_index" in report


@pytest.mark.parametrize(
    "model", golden_files("poseidon", "*/model.safetensors"), ids=lambda p: p.parent.name
)
def test_reference_layouts_are_imported_with_every_tensor(model: Path, tmp_path: Path) -> None:
    folder = import_(str(model.parent), to=tmp_path / "new")
    expected, _ = MAP.apply(load(model))
    written = load(folder / "model.safetensors")
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], expected[name]) for name in expected)


def test_imported_weights_must_fit(run: tuple[nn.Module, Path], tmp_path: Path) -> None:
    for name, content in published(tmp_path, run[0]).items():
        (tmp_path / name).write_bytes(content)
    state = load(tmp_path / "pytorch_model.bin")
    state["model.surplus"] = torch.zeros(1)
    save(state, tmp_path / "model.safetensors")
    with pytest.raises(
        ValueError, match=r"model\.safetensors does not fit ScOT: 1 tensors are not part .*surplus"
    ):
        import_(str(tmp_path), to=tmp_path / "new")
    with pytest.raises(ValueError, match="is a single file; give the folder"):
        import_(str(tmp_path / "model.safetensors"), to=tmp_path / "new")


def test_command_line_exports_imports_and_explains(
    run: tuple[nn.Module, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["export", "--ckpt", str(run[1]), "--to", str(tmp_path / "a"), "--weights", "ema"])
    main(["import", str(tmp_path / "a"), "--to", str(tmp_path / "b")])
    capsys.readouterr()
    first, second = (load(tmp_path / name / "model.safetensors") for name in "ab")
    assert all(torch.equal(first[name], second[name]) for name in first)
    with pytest.raises(SystemExit, match=r"^error: .*none\.ckpt does not exist$"):
        main(["export", "--ckpt", str(tmp_path / "none.ckpt"), "--to", str(tmp_path / "c")])
