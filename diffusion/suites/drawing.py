"""A pipeline that draws the pictures of a suite: any scheduler, an adapter, a noise for each picture."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from thalweg.diffusion.draw import choose_scheduler, open_pipeline, set_scheduler, takes
from thalweg.diffusion.library import steps_for
from thalweg.diffusion.loading import call_options
from thalweg.diffusion.nft.lora import LoraSpec, check_lora, lora_shapes, read_lora
from thalweg.diffusion.order import generator
from thalweg.diffusion.suites.pictures import Draw, Picture

if TYPE_CHECKING:
    from PIL.Image import Image

STREAM = 8
"""Sets the noise of evaluations apart from that of training and rollouts with the same seed."""
ADAPTER = "evaluated"
"""Name of the adapter in the network."""


def open_model(
    name: str, scheduler: str | None = None, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> Any:
    """A pipeline that takes prompts, with a scheduler.

    Raises:
        ValueError: If it takes none, or the scheduler does not fit.
    """
    pipe: Any = open_pipeline(name, dtype)
    if takes(pipe) != "prompts":
        raise ValueError(f"{name} is a {type(pipe).__name__}, which takes no prompts; needed: one that does")
    if scheduler is not None:
        set_scheduler(pipe, choose_scheduler(pipe, scheduler))
    return pipe.to(device)


def read_fitting(pipe: Any, path: str | Path) -> tuple[LoraSpec, dict[str, Tensor]]:
    """Read an adapter, and make sure that it is for the transformer of a pipeline.

    Raises:
        ValueError: If there is none, it is for another network, or the pipeline has no transformer.
    """
    network = getattr(pipe, "transformer", None)
    if network is None:
        raise ValueError(f"{type(pipe).__name__} has no transformer for the LoRA {path}")
    spec, state = read_lora(path)
    try:
        check_lora(state, lora_shapes(network, spec), path)
    except ValueError as error:
        raise ValueError(f"the LoRA {path} is not for this transformer: {error}") from None
    return spec, state


def add_lora(pipe: Any, spec: LoraSpec, state: Mapping[str, Tensor]) -> None:
    """Put an adapter from :func:`read_fitting` into the transformer of a pipeline."""
    network = pipe.transformer
    network.add_adapter(spec.peft(), ADAPTER)
    own = dict(network.named_parameters())
    with torch.no_grad():
        for name, value in state.items():
            own[f"{name.removesuffix('.weight')}.{ADAPTER}.weight"].copy_(value)


def drawer(pipe: Any, *, steps: int, seed: int, options: Mapping[str, Any]) -> Draw:
    """What draws a batch.

    The noise of a picture depends on the seed, the index of its prompt and its number among that prompt's
    pictures alone, so models and schedulers are compared on the same noises.

    Args:
        pipe: With its scheduler.
        steps: Evaluations of the network for each picture.
        seed: Of the noises.
        options: For the pipeline; None leaves them to it.

    Raises:
        ValueError: If the scheduler cannot do with so many evaluations, or the pipeline has no such option.
    """
    known = inspect.signature(pipe.__call__).parameters
    asked = {name: value for name, value in options.items() if value is not None}
    given: dict[str, Any] = {**call_options(pipe), **asked}
    for name in given:
        if name not in known:
            raise ValueError(f"{type(pipe).__name__} has no option {name}")
    given["num_inference_steps"] = steps_for(pipe.scheduler, steps)

    def draw(pictures: Sequence[Picture]) -> list[Image]:
        noises = [generator(STREAM, seed, p.item.index, p.copy) for p in pictures]
        prompts = [p.item.text for p in pictures]
        return pipe(prompt=prompts, generator=noises, output_type="pil", **given).images

    return draw
