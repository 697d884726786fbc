"""``thalweg ema``: weights averaged over any stretch of a run, from the snapshots of a few profiles."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from thalweg.core_optim.power_ema import Snapshot

KIND = "power_ema"
"""Of a snapshot, in the metadata of its file."""
DROPPED = (
    "averaging_state",
    "callbacks",
    "current_model_state",
    "loops",
    "lr_schedulers",
    "optimizer_states",
)
"""Entries of a checkpoint that belong to other weights than averages."""


def ema(
    folder: str,
    std: float = 0.1,
    ckpt: str | None = None,
    step: int | None = None,
    out: str | None = None,
) -> None:
    """Average the weights of a run with another profile than those that were tracked.

    Args:
        folder: Run with snapshots of the callback `thalweg.apps.power_ema.PowerEMA`.
        std: Standard deviation of the wanted profile as a share of the run, at most 0.2886; 0.1 averages over
            about the last fifth.
        ckpt: Checkpoint of the run; the averages then go into a copy of it, which `thalweg validate`,
            `evaluate` and `export` take. The newest one in the folder by default.
        step: Where the average ends; at the last snapshot by default.
        out: File to write; `ema-STD.ckpt` in the folder by default. A name that ends in .safetensors gets the
            averages alone.
    """
    weights, error = averaged(folder, std, step)
    target = Path(out or Path(folder) / f"ema-{std:g}.ckpt")
    if target.suffix == ".safetensors":
        from thalweg.checkpoints.tensors import save

        save(weights, target, {"std": std})
    else:
        write_checkpoint(weights, Path(ckpt) if ckpt else newest(folder), target)
    print(f"written to {target}; the mixed profile is {100 * error:.2g} % off the wanted one")


def averaged(folder: str | Path, std: float, step: int | None = None) -> tuple[dict[str, Tensor], float]:
    """Averages of a profile by name, and how far the mixed profile is from the wanted one, relative.

    Raises:
        ValueError: If there are no snapshots up to that step, or for a std out of range.
    """
    from thalweg.core_optim.power_ema import coefficients, distance, gamma_of, reconstruct

    snapshots = find(folder)
    end = max(s.time for s in snapshots) if step is None else float(step)
    profiles, wanted = [(s.gamma, s.time) for s in snapshots], (gamma_of(std), end)
    error = distance(profiles, coefficients(profiles, wanted), wanted)
    return reconstruct(snapshots, std=std, time=end), error


def find(folder: str | Path) -> list[Snapshot]:
    """All snapshots under a folder.

    Raises:
        ValueError: If there are none.
    """
    from thalweg.checkpoints.tensors import load, read_metadata
    from thalweg.core_optim.power_ema import Snapshot

    found = []
    for path in sorted(Path(folder).rglob("*.safetensors")):
        about = read_metadata(path)
        if about.get("kind") == KIND:
            read = partial(load, path)
            found.append(Snapshot(gamma=float(about["gamma"]), time=float(about["step"]), read=read))
    if not found:
        raise ValueError(
            f"no snapshots under {folder}: train with"
            " --trainer.callbacks+=thalweg.apps.power_ema.PowerEMA to have some"
        )
    return found


def newest(folder: str | Path) -> Path:
    """The newest checkpoint of a run.

    Raises:
        ValueError: If there is none.
    """
    found = [path for path in Path(folder).rglob("*.ckpt") if not path.name.startswith("ema-")]
    if not found:
        raise ValueError(
            f"no checkpoint under {folder}: give one with --ckpt, or a name with --out x.safetensors"
        )
    return max(found, key=lambda path: path.stat().st_mtime)


def write_checkpoint(weights: dict[str, Tensor], ckpt: Path, target: Path) -> None:
    """A copy of a checkpoint whose weights are averages; what was not averaged stays as it is.

    Raises:
        ValueError: If the checkpoint is of another network.
    """
    import io

    import torch

    from thalweg.checkpoints.atomic import write_bytes
    from thalweg.checkpoints.lightning_ckpt import read_content

    content = read_content(ckpt)
    own = dict(content.get("current_model_state", content["state_dict"]))
    odd = [n for n, w in weights.items() if n not in own or own[n].shape != w.shape]
    if odd:
        raise ValueError(f"{ckpt} is of another network than the snapshots: {odd[0]!r} does not fit")
    own |= {name: weight.to(own[name].dtype) for name, weight in weights.items()}
    kept = {name: value for name, value in content.items() if name not in DROPPED}
    buffer = io.BytesIO()
    torch.save({**kept, "state_dict": own}, buffer)
    write_bytes(target, buffer.getbuffer())
