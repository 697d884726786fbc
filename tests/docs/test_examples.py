"""The scripts in examples/ run, on small data, and their promises hold."""

import base64
import hashlib
import importlib.util
import io
import json
import re
import tarfile
from pathlib import Path
from types import ModuleType

import pytest
from pages import ROOT
from PIL import Image

from thalweg.diffusion.caption_sets import open_captions
from thalweg.diffusion.solvers import SolverSchedule
from thalweg.diffusion.vocabulary import Vocabulary
from thalweg.pde.data import catalog
from thalweg.pde.data.synthetic import write_synthetic
from thalweg.pde.poseidon import ScOT
from thalweg.pde.solvers.generate import generate

pytestmark = pytest.mark.filterwarnings("ignore:.*number of training batches")


def script(name: str) -> ModuleType:
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_script_has_a_test() -> None:
    tested = set(re.findall(r"script\(\"(\w+)\"\)", Path(__file__).read_text()))
    assert tested == {path.stem for path in (ROOT / "examples").glob("*.py")}


def test_energy_does_not_grow_and_divergence_vanishes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = generate("NS-Sines", tmp_path, 3, resolution=32, progress=False)
    script("look_at_data").main([str(file)])
    rows = re.findall(r"energy (\S+), div/curl (\S+)", capsys.readouterr().out)
    energy, ratio = ([float(value) for value in column] for column in zip(*rows, strict=True))
    assert energy == sorted(energy, reverse=True)
    assert max(ratio) < 1e-5


def test_rollout_is_scored_and_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    heat = script("finetune_own_netcdf")
    network = heat.untrained_folder(tmp_path / "network", resolution=16)
    file = write_synthetic("NS-Sines", tmp_path, samples=4, resolution=16)
    picture = tmp_path / "rollout.png"
    words = ["--network", str(network), "--data", str(file), "--steps", "7", "--out", str(picture)]
    script("rollout").main(words)
    out = capsys.readouterr().out
    assert re.findall(r"t = (\S+):", out) == ["0.10", "0.20", "0.30", "0.40", "0.50", "0.60", "0.70"]
    assert picture.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit):
        script("rollout").main([*words, "--steps", "3"])
    assert "does not divide the horizon of 14" in capsys.readouterr().err


def test_few_steps_beat_euler_and_the_known(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script("few_steps_of_your_model").main(["--nfe", "4", "--budget", "24", "--out", str(tmp_path)])
    euler, known, found = map(float, re.findall(r"(0\.\d+)", capsys.readouterr().out))
    assert found < 0.3 * known < 0.3 * euler
    assert SolverSchedule.load(tmp_path / "4.json").nfe == 4
    assert (tmp_path / "4.png").read_bytes().startswith(b"\x89PNG")


def test_own_netcdf_is_learned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(catalog, "PROBLEMS", dict(catalog.PROBLEMS))
    heat = script("finetune_own_netcdf")
    words = ["--out", str(tmp_path), "--samples", "20", "--resolution", "16", "--epochs", "6"]
    heat.main(words)
    error = float(re.search(r"at the last snapshot: (\S+) %", capsys.readouterr().out)[1])
    assert error < 85  # a prediction of the mean scores 100
    assert ScOT.from_pretrained(tmp_path / "finetuned").config.num_channels == 1


def emoji_package() -> bytes:
    """A package of the layout of emoji-datasource-google with three emoji, one of them with a variant."""

    def emoji(name: str, image: str, category: str, kind: str, **more: object) -> dict[str, object]:
        return {"name": name, "image": image, "category": category, "subcategory": kind, **more}

    variants = {"skin_variations": {"1F3FB": {"image": "1f44b-1f3fb.png"}}}
    table = [
        emoji("RED APPLE", "1f34e.png", "Food & Drink", "food-fruit"),
        emoji("T-REX", "1f996.png", "Animals & Nature", "animal-reptile"),
        emoji("WAVING HAND SIGN", "1f44b.png", "People & Body", "hand-fingers-open", **variants),
    ]
    names = ("1f34e.png", "1f996.png", "1f44b.png", "1f44b-1f3fb.png")
    files = {"package/emoji.json": json.dumps(table).encode()}
    for folder in ("64", "sheets-64"):
        for i, name in enumerate(names):
            content = io.BytesIO()
            Image.new("RGBA", (64, 64), (255, 0, 0, 255 * (i % 2))).save(content, "png")
            files[f"package/img/google/{folder}/{name}"] = content.getvalue()
    package = io.BytesIO()
    with tarfile.open(fileobj=package, mode="w:gz") as archive:
        for path, content in files.items():
            member = tarfile.TarInfo(path)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return package.getvalue()


def test_emoji_become_captioned_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    emoji, package, out = script("captioned_pictures"), emoji_package(), tmp_path / "emoji"
    (tmp_path / "package.tgz").write_bytes(package)
    words = ["--file", str(tmp_path / "package.tgz"), "--out", str(out)]
    with pytest.raises(SystemExit):
        emoji.main(words)
    assert f"needed: {emoji.INTEGRITY}" in capsys.readouterr().err
    assert not out.exists()
    digest = base64.b64encode(hashlib.sha512(package).digest()).decode()
    monkeypatch.setattr(emoji, "INTEGRITY", f"sha512-{digest}")
    emoji.main(words)
    assert capsys.readouterr().out.endswith(f"2 pictures in {out}, for vocab_size: 12\n")
    names = ["1f34e.png", "1f34e.txt", "1f996.png", "1f996.txt", "prompts.txt"]
    assert sorted(path.name for path in out.iterdir()) == names
    found = open_captions(str(out), num_train=0, num_val=0, wrong=0.0)
    assert list(found.train.captions) == ["red apple, food fruit", "t-rex, animal reptile"]
    assert (out / "prompts.txt").read_text().splitlines() == found.train.captions
    assert found.train.images_NCHW.unique().tolist() == [0, 255]
    assert found.train.images_NCHW[0].min() == 255  # transparent: paper
    assert found.train.images_NCHW[1, 1:].max() == 0  # red
    assert len(Vocabulary(words=found.words)) == 12
    with pytest.raises(SystemExit):
        emoji.main([*words, "--groups", "Foods"])
    assert "['Foods'] are unknown, allowed: Animals & Nature, Food & Drink, People" in capsys.readouterr().err
