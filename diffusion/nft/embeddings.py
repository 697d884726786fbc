"""Embeddings of prompts on disk, so that text encoders run once per prompt and can then be freed.

A prompt has a file of its own, written whole or not at all, below a folder named by a digest of everything
else that embeddings depend on: encoders (class, configuration, revision, precision, some of their weights),
tokenizers and lengths. Another encoder never finds the embeddings of this one.

Shapes: B prompts, L tokens, D their width, P width of the pooled embedding.
"""

from __future__ import annotations

import gc
import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from thalweg.checkpoints import tensors as files

Encode = Callable[[Sequence[str]], Mapping[str, Tensor]]
"""Embeddings of prompts, arguments of the network with a row per prompt."""

T5_LENGTH = 128
"""Tokens of the T5 encoder in training and rollouts; the pipeline's own default is 256."""
SAMPLED = 16
"""Values of each weight that the digest of an encoder reads."""
PASSING = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures")
"""Entries of configurations that embeddings do not depend on, or that are told otherwise."""


class PromptCache:
    """Embeddings by prompt, on disk and the last ones in memory.

    Args:
        folder: Where files are.
        identity: What embeddings depend on beside the prompt, as JSON; see :func:`text_identity`.
        keep: Prompts that stay in memory.
    """

    def __init__(self, folder: str | Path, identity: Mapping[str, Any], *, keep: int = 256) -> None:
        self.identity = dict(identity)
        self.folder = Path(folder) / _digest(self.identity)[:16]
        self.keep = keep
        self._recent: OrderedDict[str, dict[str, Tensor]] = OrderedDict()

    def path(self, prompt: str) -> Path:
        """File of a prompt."""
        name = _digest(prompt)
        return self.folder / name[:2] / f"{name}.safetensors"

    def missing(self, prompts: Sequence[str]) -> list[str]:
        """Distinct prompts without embeddings, in the order given."""
        return [prompt for prompt in dict.fromkeys(prompts) if not self.path(prompt).is_file()]

    def fill(self, prompts: Sequence[str], encode: Encode, *, batch: int = 16) -> int:
        """Encode the prompts that are missing; what is done is kept if it is cut off.

        Returns:
            How many were encoded.

        Raises:
            ValueError: If the encoder gives other than one row per prompt.
        """
        todo = self.missing(prompts)
        for start in range(0, len(todo), batch):
            part = todo[start : start + batch]
            with torch.no_grad():
                found = encode(part)
            for name, value in found.items():
                if len(value) != len(part):
                    raise ValueError(f"the encoder gave {len(value)} rows of {name} for {len(part)} prompts")
            for i, prompt in enumerate(part):
                rows = {name: value[i] for name, value in found.items()}
                files.save(rows, self.path(prompt), {"prompt": prompt, "identity": self.identity})
        return len(todo)

    def get(self, prompt: str) -> dict[str, Tensor]:
        """Embeddings of one prompt on the CPU, (L, D) and (P,).

        Raises:
            ValueError: If there are none, or the file is broken or another prompt's.
        """
        if prompt in self._recent:
            self._recent.move_to_end(prompt)
            return self._recent[prompt]
        path = self.path(prompt)
        if not path.is_file():
            raise ValueError(
                f"{self.folder} has no embeddings of the prompt {prompt!r}; fill the cache first"
            )
        found = files.load(path)
        if (said := files.read_metadata(path).get("prompt")) != prompt:
            raise ValueError(f"{path} holds the embeddings of {said!r}, not of {prompt!r}; delete it")
        self._recent[prompt] = found
        while len(self._recent) > self.keep:
            self._recent.popitem(last=False)
        return found

    def condition(
        self, prompts: Sequence[str], device: torch.device | str = "cpu", dtype: torch.dtype | None = None
    ) -> dict[str, Tensor]:
        """Embeddings of a batch, (B, L, D) and (B, P); copies of a prompt are read and moved once.

        Raises:
            ValueError: As :meth:`get` does, or for no prompts.
        """
        if not prompts:
            raise ValueError("no prompts, allowed: one and more")
        distinct = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
        rows = [self.get(prompt) for prompt in distinct]
        index = torch.tensor([distinct[prompt] for prompt in prompts], device=device)
        return {
            name: torch.stack([row[name] for row in rows]).to(device=device, dtype=dtype)[index]
            for name in rows[0]
        }


def sd3_encoder(
    pipe: Any, max_sequence_length: int = T5_LENGTH, device: torch.device | None = None
) -> Encode:
    """What Stable Diffusion 3 makes of prompts.

    Args:
        pipe: The pipeline, with its text encoders.
        max_sequence_length: Tokens of T5.
        device: Where the encoders are; the pipeline guesses if it is not given.

    Returns:
        A function that raises a ValueError once the encoders are freed.
    """

    def encode(prompts: Sequence[str]) -> dict[str, Tensor]:
        if pipe.text_encoder is None:
            raise ValueError(f"the text encoders were freed, but {prompts[0]!r} has no embeddings yet")
        same = {"prompt": list(prompts), "prompt_2": None, "prompt_3": None}
        embeds, _, pooled, _ = pipe.encode_prompt(
            **same,
            device=device,
            do_classifier_free_guidance=False,
            max_sequence_length=max_sequence_length,
        )
        return {"encoder_hidden_states": embeds, "pooled_projections": pooled}

    return encode


def text_identity(
    pipe: Any, max_sequence_length: int = T5_LENGTH, revision: str | None = None
) -> dict[str, Any]:
    """All that embeddings of a pipeline depend on but the prompt, as JSON.

    Args:
        pipe: The pipeline, with its text encoders.
        max_sequence_length: Tokens of T5.
        revision: Of the repository of the weights, where it is known.

    Raises:
        ValueError: If the encoders were freed.
    """
    parts = {k: v for k, v in sorted(pipe.components.items()) if k.startswith(("text_encoder", "tokenizer"))}
    if parts.get("text_encoder") is None:
        raise ValueError("the text encoders were freed; ask for their identity before that")
    return {
        "revision": revision,
        "max_sequence_length": max_sequence_length,
        "width": pipe.transformer.config.joint_attention_dim,
        "parts": {name: part if part is None else _identity(part) for name, part in parts.items()},
    }


def _identity(part: Any) -> dict[str, Any]:
    if not isinstance(part, nn.Module):
        return {
            "class": type(part).__name__,
            "vocabulary": _digest(part.get_vocab()),
            "length": int(part.model_max_length),
        }
    config = {k: v for k, v in part.config.to_dict().items() if k not in PASSING}
    return {
        "class": type(part).__name__,
        "config": config,
        "commit": getattr(part.config, "_commit_hash", None),
        "dtype": str(part.dtype),
        "weights": weights_digest(part),
    }


def weights_digest(network: nn.Module) -> str:
    """Digest of names, shapes and the first values of all weights; reads little, and training changes it."""
    found = hashlib.sha256()
    for name, value in network.state_dict().items():
        head = value.detach().reshape(-1)[:SAMPLED].double().cpu()
        found.update(f"{name} {tuple(value.shape)} {value.dtype} {head.tolist()}\n".encode())
    return found.hexdigest()


def free_text_encoders(pipe: Any) -> int:
    """Take the text encoders out of a pipeline, and their memory from the device.

    Returns:
        Bytes of their weights.
    """
    names = [name for name, part in pipe.components.items() if name.startswith("text_encoder") and part]
    size = sum(
        value.numel() * value.element_size() for name in names for value in getattr(pipe, name).parameters()
    )
    for name in names:
        setattr(pipe, name, None)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return size


def _digest(value: Any) -> str:
    """Of any JSON value, texts included."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
