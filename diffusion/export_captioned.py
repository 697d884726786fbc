"""Trained text-to-image denoisers as pipelines of Stable Diffusion 3, and as folders that diffusers loads.

A folder holds ``transformer``, ``text_encoder``, ``text_encoder_2``, ``tokenizer``, ``tokenizer_2``,
``scheduler`` and ``vae``. The autoencoder is a class of ours, so that plain diffusers loads the folder once
``thalweg.diffusion.shapes.vae`` is imported; our own loader imports it by itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from thalweg.diffusion.captioned import MAX_SEQUENCE_LENGTH, CaptionedTransformer
from thalweg.diffusion.export import scheduler_for
from thalweg.diffusion.loading import LENGTH_KEY, quiet
from thalweg.diffusion.schedules import NoiseSchedule
from thalweg.diffusion.shapes.codec import LinearCodec
from thalweg.diffusion.shapes.vae import ShapesVAE
from thalweg.diffusion.vocabulary import Vocabulary

if TYPE_CHECKING:
    from diffusers import StableDiffusion3Pipeline
    from torch import Tensor


def captioned_pipeline(
    network: CaptionedTransformer,
    schedule: NoiseSchedule,
    prediction: str,
    *,
    vocabulary: Vocabulary,
    codec: LinearCodec,
) -> StableDiffusion3Pipeline:
    """The pipeline whose embeddings and answers are the network's.

    Raises:
        ValueError: If diffusers has no flow scheduler for it, or the words are not as many as the network's.
    """
    if len(vocabulary) != network.vocab_size or vocabulary.length != network.length:
        raise ValueError(
            f"the network knows {network.vocab_size} words in sequences of {network.length}, but the"
            f" vocabulary has {len(vocabulary)} in {vocabulary.length}"
        )
    with quiet():
        from diffusers import StableDiffusion3Pipeline

    network.eval()
    words = vocabulary.tokenizer()
    vae = ShapesVAE.from_codec(codec).eval()
    for parameter in vae.parameters():
        parameter.data = parameter.data.to(network.transformer.dtype)
    pipe = StableDiffusion3Pipeline(
        transformer=network.transformer,
        scheduler=scheduler_for(schedule, prediction),
        vae=vae,
        text_encoder=network.text_encoder,
        tokenizer=words,
        text_encoder_2=network.text_encoder_2,
        tokenizer_2=words,
        text_encoder_3=None,
        tokenizer_3=None,
    )
    pipe.register_to_config(**{LENGTH_KEY: MAX_SEQUENCE_LENGTH})
    return pipe


def save_captioned(
    folder: str | Path,
    network: CaptionedTransformer,
    schedule: NoiseSchedule,
    prediction: str,
    facts: Mapping[str, Any],
) -> None:
    """Write a pipeline's folder.

    Args:
        folder: Where to.
        network: The network.
        schedule: Its noise schedule.
        prediction: What it answers.
        facts: ``CaptionDataModule.facts`` of the training data.

    Raises:
        ValueError: If facts are missing, or as :func:`captioned_pipeline` does.
    """
    missing = [name for name in ("words", "length", "codec") if name not in facts]
    if missing:
        raise ValueError(f"the checkpoint lacks {', '.join(missing)}: it was not trained on captions")
    codec: Mapping[str, Tensor] = facts["codec"]
    pipe = captioned_pipeline(
        network,
        schedule,
        prediction,
        vocabulary=Vocabulary(words=tuple(facts["words"]), length=int(facts["length"])),
        codec=LinearCodec(**{name: value.to(torch.float32) for name, value in codec.items()}),
    )
    with quiet():
        pipe.save_pretrained(folder)
