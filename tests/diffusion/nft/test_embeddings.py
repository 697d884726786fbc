"""Embeddings of prompts on disk: equal to the encoder's, found again, and never another encoder's."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_policy import pipeline
from torch import Tensor

from thalweg.checkpoints import tensors
from thalweg.diffusion.nft.embeddings import PromptCache, free_text_encoders, sd3_encoder, text_identity

PROMPTS = ["a red fox", "two dogs", "a red fox", ""]


def cache_of(pipe: Any, folder: Path, length: int = 12, **options: Any) -> PromptCache:
    return PromptCache(folder, text_identity(pipe, length), **options)


def test_embeddings_are_those_of_the_pipeline(tmp_path: Path) -> None:
    """Also after the encoders are freed, and in another process, which this stands for."""
    pipe = pipeline(tmp_path)
    embeds, empty, pooled, pooled_empty = pipe.encode_prompt(
        PROMPTS[:2], None, None, negative_prompt="", max_sequence_length=12
    )
    cache = cache_of(pipe, tmp_path / "cache")
    assert cache.fill(PROMPTS, sd3_encoder(pipe, 12)) == 3
    identity = cache.identity
    assert free_text_encoders(pipe) > 0
    assert pipe.text_encoder is None
    found = PromptCache(tmp_path / "cache", identity).condition(PROMPTS)
    order = [0, 1, 0]
    torch.testing.assert_close(found["encoder_hidden_states"], torch.cat([embeds[order], empty[:1]]))
    torch.testing.assert_close(found["pooled_projections"], torch.cat([pooled[order], pooled_empty[:1]]))
    assert torch.equal(found["encoder_hidden_states"][0], found["encoder_hidden_states"][2])
    assert cache.fill(PROMPTS, sd3_encoder(pipe, 12)) == 0
    with pytest.raises(ValueError, match="were freed, but 'a cat' has no embeddings"):
        cache.fill(["a cat"], sd3_encoder(pipe, 12))
    with pytest.raises(ValueError, match="were freed; ask for their identity before"):
        text_identity(pipe)


def test_the_key_has_all_that_embeddings_depend_on(tmp_path: Path) -> None:
    pipe = pipeline(tmp_path)
    folders = {cache_of(pipe, tmp_path).folder}
    assert cache_of(pipeline(tmp_path), tmp_path).folder in folders
    folders.add(cache_of(pipe, tmp_path, 16).folder)
    folders.add(PromptCache(tmp_path, text_identity(pipe, 12, revision="v2")).folder)
    with torch.no_grad():
        next(iter(pipe.text_encoder_2.parameters())).add_(0.01)
    folders.add(cache_of(pipe, tmp_path).folder)
    pipe.text_encoder.half()
    folders.add(cache_of(pipe, tmp_path).folder)
    pipe.text_encoder.config.hidden_act = "relu"
    folders.add(cache_of(pipe, tmp_path).folder)
    pipe.tokenizer.model_max_length = 8
    folders.add(cache_of(pipe, tmp_path).folder)
    assert len(folders) == 7


def numbers(prompts: Sequence[str]) -> Mapping[str, Tensor]:
    """An encoder that is easy to follow."""
    return {"e": torch.tensor([[len(p), len(p.split())] for p in prompts], dtype=torch.bfloat16)}


def test_an_interrupted_filling_goes_on_where_it_stopped(tmp_path: Path) -> None:
    cache, seen = PromptCache(tmp_path, {}), list[list[str]]()

    def failing(prompts: Sequence[str]) -> Mapping[str, Tensor]:
        seen.append(list(prompts))
        if len(seen) == 3:
            raise KeyboardInterrupt
        return numbers(prompts)

    prompts = [f"prompt {i}" for i in range(6)]
    with pytest.raises(KeyboardInterrupt):
        cache.fill(prompts, failing, batch=2)
    assert cache.missing(prompts) == ["prompt 4", "prompt 5"]
    assert cache.fill([*prompts, "prompt 0"], failing, batch=2) == 2
    assert seen[-1] == ["prompt 4", "prompt 5"]
    assert len(list(tmp_path.rglob("*.safetensors"))) == 6
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".safetensors"]


def test_values_keep_their_precision_and_few_stay_in_memory(tmp_path: Path) -> None:
    cache = PromptCache(tmp_path, {}, keep=2)
    cache.fill(["a", "b c", "d e f"], numbers)
    found = cache.condition(["d e f", "a", "b c", "a"])
    assert found["e"].tolist() == [[5, 3], [1, 1], [3, 2], [1, 1]]
    assert found["e"].dtype == torch.bfloat16
    assert cache.condition(["a"], dtype=torch.float32)["e"].dtype == torch.float32
    assert len(cache._recent) == 2


def test_faults_name_the_prompt_or_the_file(tmp_path: Path) -> None:
    cache = PromptCache(tmp_path, {})
    with pytest.raises(ValueError, match="no embeddings of the prompt 'a'; fill the cache first"):
        cache.condition(["a"])
    with pytest.raises(ValueError, match="no prompts"):
        cache.condition([])
    with pytest.raises(ValueError, match="1 rows of e for 2 prompts"):
        cache.fill(["a", "b"], lambda prompts: {"e": torch.zeros(1, 2)})
    tensors.save({"e": torch.zeros(2)}, cache.path("a"), {"prompt": "b"})
    with pytest.raises(ValueError, match="holds the embeddings of 'b', not of 'a'"):
        cache.get("a")
    cache.path("a").write_bytes(cache.path("a").read_bytes()[:50])
    with pytest.raises(ValueError, match=cache.path("a").name):
        cache.get("a")
