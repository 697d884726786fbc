"""Tensor files: exact round trips, refused pickles, damaged files, and writes that lose nothing."""

import json
import os
import pickle
import resource
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from thalweg.checkpoints.atomic import write_text
from thalweg.checkpoints.tensors import load, read_metadata, save, save_sharded

STATE = {
    "a.weight": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "a.half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "count": torch.tensor(7),
    "mask": torch.tensor([True, False]),
}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert torch.equal(a[name], b[name]), name


def test_safetensors_round_trip_is_bitwise(tmp_path: Path) -> None:
    save(STATE, tmp_path / "deep" / "m.safetensors")
    assert_same(load(tmp_path / "deep" / "m.safetensors"), STATE)


def test_files_have_the_mode_that_the_user_asked_for(tmp_path: Path) -> None:
    mask = os.umask(0o027)
    try:
        save(STATE, tmp_path / "m.safetensors")
    finally:
        os.umask(mask)
    assert stat.S_IMODE((tmp_path / "m.safetensors").stat().st_mode) == 0o640


@settings(deadline=None)
@given(
    metadata=st.dictionaries(
        st.text(),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False),
            lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
            max_leaves=6,
        ),
    )
)
def test_json_metadata_round_trip(tmp_path_factory: pytest.TempPathFactory, metadata: dict) -> None:
    path = tmp_path_factory.mktemp("meta") / "m.safetensors"
    save({"x": torch.zeros(1)}, path, metadata)
    assert read_metadata(path) == metadata


def test_foreign_metadata_stays_text(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "m.safetensors", metadata={"format": "pt", "epoch": "12"})
    assert read_metadata(tmp_path / "m.safetensors") == {"epoch": "12"}


def test_tied_strided_and_sliced_tensors_are_written_plainly(tmp_path: Path) -> None:
    base = torch.randn(4, 6)
    state = {"tied": base, "twin": base, "turned": base.t(), "part": base[1], "strip": base[:, 2:4]}
    save(state, tmp_path / "m.safetensors")
    assert_same(load(tmp_path / "m.safetensors"), state)


@pytest.mark.parametrize(
    "wrap", [lambda s: s, lambda s: {"state_dict": s, "epoch": 3}, lambda s: {"model": s}]
)
@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth"])
def test_pytorch_files_are_read_with_or_without_a_wrapper(tmp_path: Path, suffix: str, wrap: object) -> None:
    torch.save(wrap(STATE), tmp_path / f"m{suffix}")  # type: ignore[operator]
    assert_same(load(tmp_path / f"m{suffix}"), STATE)


def test_old_pytorch_format_is_read(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "m.bin", _use_new_zipfile_serialization=False)
    assert_same(load(tmp_path / "m.bin"), STATE)


def test_dtype_cast_spares_integers_and_booleans(tmp_path: Path) -> None:
    save(STATE, tmp_path / "m.safetensors")
    loaded = load(tmp_path / "m.safetensors", dtype=torch.float64)
    assert [t.dtype for t in loaded.values()].count(torch.float64) == 2
    assert loaded["count"].dtype == torch.int64
    assert loaded["mask"].dtype == torch.bool


def test_shards_and_their_index(tmp_path: Path) -> None:
    state = {f"w{i}": torch.randn(64) for i in range(8)}
    index = save_sharded(state, tmp_path, {"step": 3}, max_shard_size=600)
    assert index.name == "model.safetensors.index.json"
    shards = sorted(tmp_path.glob("model-*-of-*.safetensors"))
    assert len(shards) == 4
    assert_same(load(index), state)
    assert read_metadata(shards[0]) == {"step": 3}
    assert save_sharded(state, tmp_path / "one").name == "model.safetensors"


def test_missing_shard_and_missing_tensor_are_named(tmp_path: Path) -> None:
    index = save_sharded({f"w{i}": torch.randn(64) for i in range(4)}, tmp_path, max_shard_size=600)
    last = sorted(tmp_path.glob("*-of-*"))[-1]
    save({"other": torch.zeros(1)}, last)
    with pytest.raises(ValueError, match=rf"{last.name} lacks 'w2' \(2 tensors\)"):
        load(index)
    last.unlink()
    with pytest.raises(ValueError, match=rf"{last.name} does not exist"):
        load(index)


def test_index_may_not_point_outside_its_folder(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": "../secret.safetensors"}}))
    with pytest.raises(ValueError, match="outside its own folder"):
        load(index)


class Attack:
    """Asks the unpickler to write a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("form", ["zip", "old", "bare"])
def test_malicious_pickle_is_refused_and_not_run(tmp_path: Path, form: str) -> None:
    path, trace = tmp_path / "m.bin", tmp_path / "ran"
    if form == "bare":
        path.write_bytes(pickle.dumps({"w": Attack(trace)}, protocol=2))
    else:
        torch.save({"w": Attack(trace)}, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(ValueError, match=r"m\.bin is refused.*run code.*posix\.system.*\.safetensors"):
        load(path)
    assert not trace.exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("m.safetensors", b"<!DOCTYPE html><html>Not found</html>", "holds a web page"),
        ("m.safetensors", b"", "is empty"),
        ("m.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS pointer"),
        ("m.safetensors", b"\x80\x02}q\x00.", "is a PyTorch file under another name"),
        ("m.safetensors", b"\xff" * 64, "truncated or damaged"),
        ("m.bin", b"<html>503</html>", "holds a web page"),
        ("m.bin", b"", "is empty"),
        ("m.bin", b"\x00\x01\x02", "m.bin"),
        ("model.safetensors.index.json", b"{}", "is no index of shards"),
        ("model.safetensors.index.json", b"<html>", "holds a web page"),
        ("m.npz", b"", r"unknown kind of weight file '\.npz', allowed: \.safetensors"),
    ],
)
def test_damaged_files_name_the_likely_cause(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as info:
        load(tmp_path / name)
    assert str(tmp_path / name) in str(info.value)


@pytest.mark.parametrize("share", [0.02, 0.5, 0.99])
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_truncated_files_are_refused(tmp_path: Path, suffix: str, share: float) -> None:
    path = tmp_path / f"m{suffix}"
    if suffix == ".bin":
        torch.save({"w": torch.randn(500)}, path)
    else:
        save({"w": torch.randn(500)}, path)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(ValueError, match=f"m{suffix}"):
        load(path)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_bare_pickles_of_all_protocols_are_refused(tmp_path: Path, protocol: int) -> None:
    path, trace = tmp_path / "m.bin", tmp_path / "ran"
    path.write_bytes(pickle.dumps({"w": Attack(trace)}, protocol=protocol))
    with pytest.raises(ValueError, match=r"m\.bin is (refused|no PyTorch file)"):
        load(path)
    assert not trace.exists()


def test_renamed_entry_in_a_zip_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "m.bin"
    torch.save({"w": torch.randn(500)}, path)
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    assert any(name.endswith("data.pkl") for name in names)
    damaged = path.read_bytes().replace(b"data.pkl", b"data.pkX")
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"m\.bin cannot be read"):
        load(path)


def test_other_content_is_described(tmp_path: Path) -> None:
    torch.save({"epoch": 3, "note": "hi"}, tmp_path / "m.pt")
    with pytest.raises(ValueError, match=r"holds no state dict of tensors \(found: epoch, note\)"):
        load(tmp_path / "m.pt")
    torch.save([torch.zeros(1)], tmp_path / "m.pt")
    with pytest.raises(ValueError, match=r"\(found: list\)"):
        load(tmp_path / "m.pt")


def test_missing_file_and_wrong_target_suffix(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.safetensors does not exist"):
        load(tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match=r"written as \.safetensors, not '\.bin'"):
        save(STATE, tmp_path / "m.bin")


FULL_DISK = """
import resource, signal, sys, torch
from thalweg.checkpoints.tensors import save
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
try:
    save({"w": torch.ones(50_000)}, sys.argv[1])
except OSError as err:
    sys.exit(0 if "cannot write" in str(err) else 3)
sys.exit(4)
"""


def test_full_disk_leaves_the_old_file_and_no_litter(tmp_path: Path) -> None:
    """A limit on file size stands in for a full disk: the write fails half-way in both."""
    assert resource.RLIM_INFINITY
    path = tmp_path / "m.safetensors"
    save(STATE, path)
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert_same(load(path), STATE)
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


def test_interrupted_text_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "config.json"
    write_text(path, "old")

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]
