"""Bytes counted on the meta device are those of real tensors, and those that the allocator hands out."""

import itertools

import pytest
import torch
from tiny_policy import question, transformer
from torch import Tensor, nn

from thalweg.diffusion.nft.live import (
    LOWER,
    GpuKernels,
    LiveBytes,
    checkpointed,
    inference_bytes,
    training_bytes,
)
from thalweg.diffusion.nft.lora import LoraSpec
from thalweg.diffusion.nft.policy import LoraPolicy

CASES = list(itertools.product(("lora", "full"), (False, True), (False, True)))


def like_cpu(autocast: bool) -> GpuKernels:
    """What autocast of the CPU does, where norms stay in half precision."""
    return GpuKernels(torch.bfloat16 if autocast else None, LOWER, ())


def on_cpu(autocast: bool) -> torch.autocast:
    """The same by torch. Cached casts would live on after the call."""
    return torch.autocast("cpu", torch.bfloat16, enabled=autocast, cache_enabled=False)


def network(kind: str, device: str) -> nn.Module:
    """The tiny transformer, and adapters that train."""
    found = transformer()
    if kind == "lora":
        LoraPolicy(found, LoraSpec(r=4, alpha=8))
    else:
        found.requires_grad_(True)
    for module in found.modules():
        module._apply(lambda value: value.to(device), recurse=False)
    return found.train()


def asked(found: nn.Module, device: str, batch: int = 3) -> tuple[list[Tensor], object]:
    """Inputs, and a call with them."""
    x, timestep, condition = question(batch)
    given = [value.to(device) for value in (x, timestep, *condition.values())]
    names = ("hidden_states", "timestep", *condition)
    return given, lambda: found(**dict(zip(names, given)), return_dict=False)[0]


@pytest.mark.parametrize(("kind", "autocast", "again"), CASES)
def test_meta_counts_what_real_tensors_hold(kind: str, autocast: bool, again: bool) -> None:
    counts = []
    for device in ("meta", "cpu"):
        found = network(kind, device)
        kernels = like_cpu(autocast) if device == "meta" else on_cpu(autocast)
        if again and device == "meta":
            found.enable_gradient_checkpointing(checkpointed(like_cpu(autocast)))
        elif again:
            found.enable_gradient_checkpointing()
        given, call = asked(found, device)
        counts.append(training_bytes(call, found, given, kernels))
        counts[-1] += (inference_bytes(call, [*found.parameters(), *found.buffers(), *given], kernels),)
    if autocast:  # norms of the CPU keep their statistics in half precision, those of GPUs and meta do not
        assert counts[0] == pytest.approx(counts[1], rel=0.02)
    else:
        assert counts[0] == counts[1]
    waiting, peak, inference = counts[0]
    assert 0 < inference < peak
    assert waiting <= peak


@pytest.mark.parametrize("autocast", [False, True])
def test_what_waits_is_what_autograd_has_saved(autocast: bool) -> None:
    found = network("lora", "cpu")
    given, call = asked(found, "cpu")
    weights = {value.untyped_storage()._cdata for value in [*found.parameters(), *found.buffers(), *given]}
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage._cdata not in weights:
            saved[storage._cdata] = storage
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value), on_cpu(autocast):
        answer = call()
    saved[answer.untyped_storage()._cdata] = answer.untyped_storage()
    waiting, _ = training_bytes(call, found, given, on_cpu(autocast))
    assert waiting == sum(storage.nbytes() for storage in saved.values())


@pytest.mark.parametrize("again", [False, True])
def test_count_follows_the_allocator(again: bool) -> None:
    found = network("full", "cpu")
    if again:
        found.enable_gradient_checkpointing()
    given, call = asked(found, "cpu", batch=64)
    _, peak = training_bytes(call, found, given, None)
    for value in found.parameters():
        value.grad = torch.zeros_like(value)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as seen:
        answer = call()
        answer.backward(torch.ones_like(answer))
    now = highest = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            highest = max(highest, now)
    assert peak == pytest.approx(highest, rel=0.05)


def test_views_count_once_and_what_is_gone_does_not() -> None:
    given = torch.zeros(10)
    with LiveBytes([given]) as live:
        view = given.view(2, 5)
        assert live.now == 0
        one = view + 1  # 40 bytes
        two = one.double()[0]  # 80
        assert live.now == 120
        del one
        assert live.now == 80
        del two
    assert (live.now, live.peak) == (0, 120)


def test_autocast_of_a_gpu_does_norms_in_float32() -> None:
    x = torch.empty(2, 3, 8, device="meta")
    layer = nn.Linear(8, 8, device="meta")
    with GpuKernels(torch.float16):
        half = layer(x)
        assert half.dtype == torch.float16
        assert nn.functional.layer_norm(half, (8,)).dtype == torch.float32
        assert (half @ x.mT).dtype == torch.float16
        assert half.pow(2).dtype == torch.float32
        assert nn.functional.softmax(half, -1).dtype == torch.float32
        attended = nn.functional.scaled_dot_product_attention(x[None], x[None], x[None])
        assert attended.dtype == torch.float16


def test_attention_keeps_no_weights() -> None:
    x = torch.empty(1, 2, 1000, 8, device="meta", requires_grad=True)
    with LiveBytes([x]) as live, GpuKernels():
        found = nn.functional.scaled_dot_product_attention(x, x, x)
    assert found.shape == x.shape
    assert live.peak == 4 * (2 * 1000 * 8 + 2 * 1000)
