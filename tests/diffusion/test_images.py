"""Image sets: what ships in packages, folders of one's own, and the split."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from thalweg.diffusion.images import SETS, ArraySet, open_images, split


@pytest.mark.parametrize(("name", "count"), [("mnist5k", 5000), ("digits", 1797)])
def test_packaged_sets_have_ten_classes_of_grey_images(name: str, count: int) -> None:
    found = open_images(name, size=16, channels=1)
    assert isinstance(found, ArraySet)
    assert found.images_NCHW.shape == (count, 1, 16, 16)
    assert found.images_NCHW.dtype == torch.uint8
    assert set(found.labels) == set(range(10))
    assert list(found.names) == [str(k) for k in range(10)]
    assert found.images_NCHW.float().mean(dim=(1, 2, 3)).min() > 5  # every image has ink


def test_a_class_is_more_like_its_own_mean_than_like_others() -> None:
    found = open_images("mnist5k", size=16, channels=1)
    assert isinstance(found, ArraySet)
    pixels, labels = found.images_NCHW.float().flatten(1), torch.tensor(found.labels)
    means = torch.stack([pixels[labels == k].mean(0) for k in range(10)])
    assert (torch.cdist(pixels, means).argmin(1) == labels).float().mean() > 0.75


def test_half_the_size_is_the_mean_of_four_pixels() -> None:
    images, _ = SETS["mnist5k"]()
    whole = images[7].astype(float)
    means = (whole[::2, ::2] + whole[1::2, ::2] + whole[::2, 1::2] + whole[1::2, 1::2]) / 4
    half = open_images("mnist5k", size=16, channels=1).image(7)[0].numpy()
    assert np.abs(half - means).max() <= 0.5


def test_rgb_repeats_grey() -> None:
    rgb = open_images("digits", size=8, channels=3).image(3)
    assert rgb.shape == (3, 8, 8)
    assert torch.equal(rgb[0], rgb[2])


def write_image(path: Path, colour: tuple[int, int, int], size: tuple[int, int] = (12, 8)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def test_transparent_images_are_on_white(tmp_path: Path) -> None:
    picture = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    picture.paste((0, 0, 255, 255), (0, 0, 4, 8))
    picture.save(tmp_path / "a.png")
    shown = open_images(str(tmp_path), size=8, channels=3).image(0)
    assert shown[:, 4, 1].tolist() == [0, 0, 255]
    assert shown[:, 4, 6].tolist() == [255, 255, 255]


def test_a_folder_has_its_sub_folders_as_classes(tmp_path: Path) -> None:
    write_image(tmp_path / "red" / "a.png", (255, 0, 0))
    write_image(tmp_path / "blue" / "b.png", (0, 0, 255))
    write_image(tmp_path / "blue" / "deep" / "c.PNG", (0, 0, 200))
    (tmp_path / "blue" / "notes.txt").write_text("no image")
    found = open_images(str(tmp_path), size=4, channels=3)
    assert list(found.names) == ["blue", "red"]
    assert list(found.labels) == [0, 0, 1]
    assert found.image(2)[:, 0, 0].tolist() == [255, 0, 0]
    assert found.image(0).shape == (3, 4, 4)


def test_a_folder_without_sub_folders_is_one_class(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png", (9, 9, 9))
    found = open_images(str(tmp_path), size=4, channels=1)
    assert list(found.labels) == [0]
    assert found.image(0).unique().tolist() == [9]


def test_bad_sources_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'mnist' is no folder and no packaged set: mnist5k, digits"):
        open_images("mnist", size=8, channels=1)
    with pytest.raises(ValueError, match="has no images"):
        open_images(str(tmp_path), size=8, channels=1)
    with pytest.raises(ValueError, match=r"channels is 2, allowed: 1 \(grey\), 3 \(RGB\)"):
        open_images("digits", size=8, channels=2)
    (tmp_path / "a.png").write_bytes(b"not a picture")
    broken = open_images(str(tmp_path), size=8, channels=1)
    with pytest.raises(ValueError, match=r"a\.png cannot be read as an image"):
        broken.image(0)


def test_split_is_fixed_disjoint_and_complete() -> None:
    train, val = split(100, 10)
    assert sorted(train + val) == list(range(100))
    assert len(val) == 10
    assert split(100, 10) == (train, val)
    with pytest.raises(ValueError, match="num_val is 100, allowed: 0 to 99"):
        split(100, 100)
