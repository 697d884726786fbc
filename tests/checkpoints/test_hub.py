"""References: how they are read, and what they resolve to in folders, in the cache and on a hub."""

from pathlib import Path

import huggingface_hub.constants
import pytest
from hubserver import COMMIT, Hub, serve, write_cache
from hypothesis import given, settings
from hypothesis import strategies as st

from thalweg.checkpoints.hub import WEIGHT_FILES, HubRef, parse, resolve, weight_file

names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,8}", fullmatch=True)
MODEL = {"config.json": b"{}", "model.safetensors": b"new", "pytorch_model.bin": b"old", "README.md": b"hi"}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def online(cache: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    return monkeypatch


def connect(online: pytest.MonkeyPatch, url: str) -> None:
    online.setattr(huggingface_hub.constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    online.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@settings(deadline=None)
@given(org=names, name=names, revision=st.none() | names, file=st.none() | st.lists(names, min_size=1))
def test_reference_is_read_back_from_its_text(
    org: str, name: str, revision: str | None, file: list[str] | None
) -> None:
    ref = HubRef(repo_id=f"{org}/{name}", revision=revision, filename="/".join(file) if file else None)
    assert parse(str(ref)) == ref


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hf://o/n@refs/pr/3/a/b.bin", HubRef(repo_id="o/n", revision="refs/pr/3", filename="a/b.bin")),
        ("hf://o/n@feature%2Fx", HubRef(repo_id="o/n", revision="feature/x")),
        ("o/n@v1", HubRef(repo_id="o/n", revision="v1")),
        ("hf://o/n/a@b.bin", HubRef(repo_id="o/n", filename="a@b.bin")),
    ],
)
def test_unusual_references(text: str, expected: HubRef) -> None:
    assert parse(text) == expected


@pytest.mark.parametrize("text", ["hf://o", "hf://o/n@", "hf://o/n/../x", "hf:///n", "hf://o/n@/file"])
def test_malformed_references_say_how_to_write_them(text: str) -> None:
    with pytest.raises(ValueError, match="is no hub reference; write org/name or hf://"):
        parse(text)


def test_local_folder_and_file_win_over_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "org" / "name"
    folder.mkdir(parents=True)
    (folder / "x.bin").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    assert resolve("org/name") == Path("org/name")
    assert resolve("org/name", filename="x.bin") == Path("org/name/x.bin")
    assert resolve(folder / "x.bin") == folder / "x.bin"


def test_missing_local_path_and_file_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere does not exist; for a model on the hub write org/name"):
        resolve(tmp_path / "nowhere")
    (tmp_path / "a.txt").touch()
    with pytest.raises(ValueError, match=r"has no file 'x.bin' \(found: a\.txt\)"):
        resolve(tmp_path, filename="x.bin")
    with pytest.raises(ValueError, match="is a local path, which has no revision 'v1'"):
        resolve(tmp_path, revision="v1")


@pytest.mark.parametrize(
    "ref", ["org/model", "hf://org/model", f"hf://org/model@{COMMIT}", "hf://org/model@main"]
)
def test_cached_model_resolves_offline(cache: Path, ref: str) -> None:
    snapshot = write_cache(cache, "org/model", MODEL)
    assert resolve(ref) == snapshot
    assert weight_file(resolve(ref)).read_bytes() == b"new"


def test_cached_file_resolves_offline(cache: Path) -> None:
    write_cache(cache, "org/model", {"sub/w.bin": b"1"})
    assert resolve("hf://org/model/sub/w.bin").read_bytes() == b"1"
    assert resolve("org/model", filename="sub/w.bin", revision="main").read_bytes() == b"1"
    with pytest.raises(ValueError, match="already states"):
        resolve("hf://org/model/sub/w.bin", filename="other.bin")


def test_offline_errors_name_the_cache_and_the_command(cache: Path) -> None:
    with pytest.raises(ValueError, match="offline mode is on") as info:
        resolve("hf://org/absent@v2")
    message = str(info.value)
    assert str(cache) in message
    assert "'HF_HUB_OFFLINE=0 hf download org/absent --revision v2'" in message
    assert "\n" not in message
    with pytest.raises(ValueError, match=r"offline mode is on; .*hf download org/absent w\.bin'"):
        resolve("hf://org/absent/w.bin")


def test_snapshot_without_weights_is_not_a_model(cache: Path) -> None:
    write_cache(cache, "org/model", {"config.json": b"{}"})
    with pytest.raises(ValueError, match="hf download org/model"):
        resolve("org/model")


def test_download_takes_configuration_and_the_best_weights_only(online: pytest.MonkeyPatch) -> None:
    with serve(Hub({"org/model": {**MODEL, "plot.png": b"png"}})) as hub:
        connect(online, hub.url)
        folder = resolve("org/model")
        assert sorted(p.name for p in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
        assert (folder / "model.safetensors").read_bytes() == b"new"
        assert "pytorch_model.bin" not in hub.fetched


def test_download_takes_all_shards(online: pytest.MonkeyPatch) -> None:
    shards = {f"pytorch_model-0000{i}-of-00002.bin": b"x" for i in (1, 2)}
    files = {"config.json": b"{}", "pytorch_model.bin.index.json": b"{}", **shards}
    with serve(Hub({"org/model": files})) as hub:
        connect(online, hub.url)
        assert {p.name for p in resolve("org/model").iterdir()} == set(files)


def test_downloaded_model_is_found_when_the_hub_is_down(online: pytest.MonkeyPatch) -> None:
    with serve(Hub({"org/model": MODEL})) as hub:
        connect(online, hub.url)
        folder = resolve("org/model")
    assert resolve("org/model") == folder
    with pytest.raises(ValueError, match=r"org/other is not in the cache .* the hub cannot be reached"):
        resolve("org/other")


@pytest.mark.parametrize(
    ("ref", "message"),
    [
        ("org/absent", "there is no repository 'org/absent' on the hub, or it is private"),
        ("hf://org/absent/w.bin", "there is no repository 'org/absent' on the hub"),
        ("hf://org/model@v9", "org/model has no revision 'v9'"),
        ("hf://org/model@v9/config.json", "org/model has no revision 'v9'"),
        ("hf://org/model/w.bin", r"org/model has no file 'w\.bin'"),
        ("org/gated", "asks for an agreement: accept it at https://huggingface.co/org/gated"),
        ("org/empty", r"holds none of model\.safetensors, .*\(found: notes\.txt\)"),
    ],
)
def test_hub_errors_are_told_apart(online: pytest.MonkeyPatch, ref: str, message: str) -> None:
    repos = {"org/model": MODEL, "org/empty": {"notes.txt": b""}}
    with serve(Hub(repos, gated=("org/gated",))) as hub:
        connect(online, hub.url)
        with pytest.raises(ValueError, match=message) as info:
            resolve(ref)
        assert "\n" not in str(info.value)


def test_weight_file_prefers_safetensors_and_single_files(tmp_path: Path) -> None:
    for name in reversed(WEIGHT_FILES):
        (tmp_path / name).touch()
        assert weight_file(tmp_path).name == name
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"holds none of model\.safetensors, .*\(found: nothing\)"):
        weight_file(tmp_path / "empty")
