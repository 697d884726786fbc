"""Tensors on disk: safetensors with JSON metadata, sharded or not, and PyTorch files without code execution.

Writing is atomic: a temporary file in the same folder replaces the old one only once it is complete.
"""

from __future__ import annotations

import errno
import json
import pickle
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from thalweg.checkpoints.atomic import write_atomically, write_text

PICKLED = (".bin", ".pt", ".pth")
"""Suffixes of PyTorch files."""
METADATA_KEY = "thalweg"
"""Header entry that holds the metadata written by ``save``, as one JSON object."""


def load(path: str | Path, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Read all tensors of a file onto the CPU.

    Args:
        path: ``*.safetensors``, ``*.bin``, ``*.pt``, ``*.pth``, or the ``*.index.json`` of a sharded set.
        dtype: Convert floating-point tensors to this type; integers and booleans stay as they are.

    Raises:
        ValueError: If the file is missing, damaged, of an unknown kind, or holds more than plain tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} does not exist or is not a file")
    if path.name.endswith(".index.json"):
        state = _load_shards(path)
    elif path.suffix == ".safetensors":
        state = _load_safetensors(path)
    elif path.suffix in PICKLED:
        state = _state_dict_of(load_pickled(path), path)
    else:
        kinds = ", ".join((".safetensors", *PICKLED, ".index.json"))
        raise ValueError(f"{path}: unknown kind of weight file {path.suffix!r}, allowed: {kinds}")
    if dtype is None:
        return state
    return {name: t.to(dtype) if t.is_floating_point() else t for name, t in state.items()}


def save(tensors: Mapping[str, Tensor], path: str | Path, metadata: Mapping[str, Any] | None = None) -> None:
    """Write tensors to one safetensors file; tensors that share memory are written separately.

    Args:
        tensors: Tensors by name, of any device and memory layout.
        path: Target with the suffix ``.safetensors``; its folder is made if needed.
        metadata: JSON-serialisable values, read back by ``read_metadata``.

    Raises:
        ValueError: If the suffix is another one.
        OSError: If writing fails; an older file at ``path`` is then still there.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: tensors are written as .safetensors, not {path.suffix!r}")
    header = {"format": "pt", METADATA_KEY: json.dumps(dict(metadata or {}))}
    plain = _unshared(tensors)

    def write(temporary: Path) -> None:
        try:
            save_file(plain, temporary, metadata=header)
        except SafetensorError as err:
            raise OSError(f"cannot write {path}: {err}") from err

    write_atomically(path, write)


def save_sharded(
    tensors: Mapping[str, Tensor],
    folder: str | Path,
    metadata: Mapping[str, Any] | None = None,
    max_shard_size: int | str = "5GB",
) -> Path:
    """Write ``model.safetensors``, or shards with an index if the tensors exceed a shard's size.

    Returns:
        The single file or the index.
    """
    from huggingface_hub import split_torch_state_dict_into_shards

    folder = Path(folder)
    plan = split_torch_state_dict_into_shards(dict(tensors), max_shard_size=max_shard_size)
    for filename, names in plan.filename_to_tensors.items():
        save({name: tensors[name] for name in names}, folder / filename, metadata)
    if not plan.is_sharded:
        return folder / next(iter(plan.filename_to_tensors))
    index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
    target = folder / "model.safetensors.index.json"
    write_text(target, json.dumps(index, indent=2) + "\n")
    return target


def read_metadata(path: str | Path) -> dict[str, Any]:
    """Metadata of a safetensors file: what ``save`` was given, and foreign header entries as text."""
    path = Path(path)
    with _explained(path), safe_open(path, framework="pt") as file:
        header = dict(file.metadata() or {})
    own = json.loads(header.pop(METADATA_KEY, "{}"))
    header.pop("format", None)
    return {**header, **own}


def load_pickled(path: Path) -> Any:
    """Read a PyTorch file with the restricted unpickler, which builds tensors and plain containers only.

    Raises:
        ValueError: If the file is damaged or asks for anything else.
    """
    with path.open("rb") as file:
        magic = file.read(2)
    if not magic.startswith((b"PK", b"\x80")):
        raise ValueError(f"{path} is no PyTorch file: {_diagnosis(path, 'unknown content')}")
    try:
        with warnings.catch_warnings():
            # Instructions of newer pickle protocols are either known to the restricted unpickler or refused.
            warnings.filterwarnings("ignore", message="Detected pickle protocol")
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as err:
        if (demand := _refused_demand(err)) is None:
            raise ValueError(f"{path} cannot be read: {_diagnosis(path, str(err))}") from err
        raise ValueError(
            f"{path} is refused: it is no plain set of tensors but a pickle that may run code when opened"
            f" ({demand}); ask its author for a .safetensors file"
        ) from None
    except (RuntimeError, EOFError, KeyError, ValueError, AttributeError, IndexError, TypeError) as err:
        raise ValueError(f"{path} cannot be read: {_diagnosis(path, str(err))}") from err
    except OSError as err:
        if err.errno != errno.EINVAL:  # a seek to a place that a truncated archive does not have
            raise
        raise ValueError(f"{path} cannot be read: {_diagnosis(path, str(err))}") from err


def _refused_demand(err: pickle.UnpicklingError) -> str | None:
    """The sentence in which torch says what a pickle asked for; None if the file is merely damaged."""
    for line in str(err).splitlines():
        if "Unsupported" in line or "Trying to" in line or "not allowed" in line:
            return line.split("WeightsUnpickler error: ")[-1].split(". Please")[0].strip().rstrip(".")
    return None


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    with _explained(path), safe_open(path, framework="pt", device="cpu") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping


def _load_shards(index: Path) -> dict[str, Tensor]:
    try:
        weight_map: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as err:
        raise ValueError(f"{index} is no index of shards: {_diagnosis(index, repr(err))}") from err
    state: dict[str, Tensor] = {}
    for filename in dict.fromkeys(weight_map.values()):
        if Path(filename).name != filename:
            raise ValueError(f"{index} names the shard {filename!r}, which lies outside its own folder")
        shard = load(index.parent / filename)
        wanted = {name for name, home in weight_map.items() if home == filename}
        if lost := sorted(wanted - shard.keys()):
            raise ValueError(
                f"{index.parent / filename} lacks {lost[0]!r} ({len(lost)} tensors), see {index.name}"
            )
        state.update({name: shard[name] for name in shard if name in wanted})
    return state


def _state_dict_of(content: Any, path: Path) -> dict[str, Tensor]:
    """The tensors of a PyTorch file, which may sit one level down under the usual names."""
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping) or not all(isinstance(v, Tensor) for v in content.values()):
        found = (
            ", ".join(map(str, list(content)[:6])) if isinstance(content, Mapping) else type(content).__name__
        )
        raise ValueError(f"{path} holds no state dict of tensors (found: {found})")
    return dict(content)


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors, none of which share memory, as safetensors asks for."""
    plain: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        value = tensor.detach().cpu().contiguous()
        storage = value.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != value.nbytes:
            value = value.clone()
        seen.add(value.untyped_storage().data_ptr())
        plain[name] = value
    return plain


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn errors of the safetensors reader into ones that name the file and the likely cause."""
    try:
        yield
    except (SafetensorError, UnicodeDecodeError) as err:
        raise ValueError(f"{path} is no valid safetensors file: {_diagnosis(path, str(err))}") from err


def _diagnosis(path: Path, error: str) -> str:
    """Likely cause of unreadable content, from its first bytes."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(256)
    if size == 0:
        return "it is empty; delete it and fetch it again"
    text = head.lstrip().lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "it holds a web page, probably an error message that a download saved; fetch it again"
    if text.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer, not the weights; run 'git lfs pull' in its repository"
    if path.suffix == ".safetensors" and head.startswith((b"PK", b"\x80")):
        return "it is a PyTorch file under another name; rename it to .bin"
    first = error.strip().splitlines()[0] if error.strip() else "unreadable"
    return f"{first} ({size} bytes; truncated or damaged, fetch it again)"
