"""Policies in one network: who answers, who is trained, who follows whom, and what is saved."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_policy import SPEC, move, policy, question, transformer

from thalweg.checkpoints import tensors
from thalweg.diffusion.nft.lora import LoraSpec
from thalweg.diffusion.nft.policy import STORED, FullPolicy, LoraPolicy, Policy, Who

KINDS = ("lora", "full")


@pytest.fixture(params=KINDS)
def found(request: pytest.FixtureRequest) -> Policy:
    return policy(request.param)


def answers(found: Policy) -> dict[str, torch.Tensor]:
    everyone: tuple[Who, ...] = ("current", "old", "ema", "reference")
    return {who: found.velocity(who, *question()).detach() for who in everyone}


def test_all_policies_start_as_the_network(found: Policy) -> None:
    x, t, condition = question()
    with torch.no_grad():
        expected = transformer()(x, timestep=t, **condition).sample
    assert all(torch.equal(answer, expected) for answer in answers(found).values())
    assert found.old_is_current()


def test_a_step_moves_the_current_policy_alone(found: Policy) -> None:
    before = answers(found)
    move(found)
    after = answers(found)
    assert not torch.allclose(after["current"], before["current"])
    for who in ("old", "ema", "reference"):
        assert torch.equal(after[who], before[who]), who
    assert not found.old_is_current()


def test_only_the_current_policy_has_gradients(found: Policy) -> None:
    """Also where another one was asked last, which makes PEFT freeze it."""
    move(found)
    asked = found.velocities(*question(), reference=True)
    assert not asked.old.requires_grad
    assert asked.reference is not None
    assert not asked.reference.requires_grad
    asked.current.square().mean().backward()
    trained = set(found.trainable().values())
    # The last block asks its text nothing, and attention ignores biases of keys: those gradients are zero.
    assert sum(bool(value.grad is not None and value.grad.any()) for value in trained) > 0.9 * len(trained)
    for value in found.networks.parameters():
        assert value.requires_grad == (value in trained)
        assert (value.grad is not None) == (value in trained)


@pytest.mark.parametrize("who", ["old", "ema", "reference"])
def test_an_error_within_a_block_leaves_the_current_policy_selected(found: Policy, who: Who) -> None:
    move(found)
    x, t, condition = question()
    expected = found.velocity("current", x, t, condition)
    with pytest.raises(RuntimeError, match="out of memory"), found.using(who), found.using("old"):
        raise RuntimeError("out of memory")
    assert torch.equal(found.velocity("current", x, t, condition), expected)
    assert all(value.requires_grad for value in found.trainable().values())
    if isinstance(found, LoraPolicy):
        assert torch.equal(found.network(x, timestep=t, **condition).sample, expected)


def test_nested_blocks_return_to_the_outer_policy(found: Policy) -> None:
    move(found)
    x, t, condition = question()
    with torch.no_grad(), found.using("old") as network:
        if isinstance(found, LoraPolicy):
            assert found.network.active_adapters() == ["old"]
        expected = network(x, timestep=t, **condition).sample
        with found.using("reference"), found.using("current"):
            pass
        assert torch.equal(network(x, timestep=t, **condition).sample, expected)


def test_policies_follow_the_current_one(found: Policy) -> None:
    start = found.weights("old")
    move(found)
    found.follow("old", 0.75)
    for name, value in found.named("old").items():
        torch.testing.assert_close(value.detach(), 0.75 * start[name] + 0.25 * found.weights("current")[name])
    found.follow("old", 0.0)
    assert found.old_is_current()
    found.follow_ema(1)  # decay 2 / 11
    for name, value in found.named("ema").items():
        expected = 2 / 11 * start[name] + 9 / 11 * found.weights("current")[name]
        torch.testing.assert_close(value.detach(), expected)


def test_equal_policies_give_the_same_answer_in_one_evaluation(found: Policy) -> None:
    move(found)
    found.follow("old", 0.0)
    calls = count_calls(found)
    short = found.velocities(*question(), reference=False, old_is_current=True)
    assert calls.pop() == 1
    assert short.reference is None
    long = found.velocities(*question(), reference=True)
    assert calls.pop() == 3
    assert torch.equal(short.current, long.current)
    assert torch.equal(short.old, short.current)
    torch.testing.assert_close(short.old, long.old)  # kernels depend on requires_grad, and differ by rounding
    assert not short.old.requires_grad
    assert short.current.requires_grad


class Calls(list[int]):
    """Evaluations since the last pop."""

    def pop(self, *_: Any) -> int:
        count = len(self)
        self.clear()
        return count


def count_calls(found: Policy) -> Calls:
    calls = Calls()
    for network in found.networks.values():
        network.register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_a_file_holds_the_policies_and_nothing_else(found: Policy, tmp_path: Path) -> None:
    move(found, seed=3)
    found.follow("old", 0.4)
    found.follow_ema(5)
    move(found, seed=4)
    tensors.save(found.state_dict(), tmp_path / "policy.safetensors")
    again = policy("lora" if isinstance(found, LoraPolicy) else "full")
    again.load_state_dict(tensors.load(tmp_path / "policy.safetensors"))
    for who in STORED:
        for name, value in found.named(who).items():
            assert torch.equal(again.named(who)[name], value)
    expected = answers(found)
    assert all(torch.equal(answer, expected[who]) for who, answer in answers(again).items())
    assert len(found.state_dict()) == 3 * len(found.trainable())


def test_saved_weights_are_copies(found: Policy) -> None:
    """Those of a CPU as well, so that later steps do not change them."""
    state = found.state_dict()
    kept = copy.deepcopy(state)
    move(found)
    assert all(torch.equal(state[name], kept[name]) for name in state)


def test_states_that_do_not_fit_name_a_tensor_and_change_nothing(found: Policy) -> None:
    before = found.state_dict()
    move(found)
    state = found.state_dict()
    name = next(iter(found.trainable()))
    found.load_state_dict(before)
    wrong = {
        "lacks": {k: v for k, v in state.items() if k != f"ema.{name}"},
        "shape": {**state, f"ema.{name}": state[f"ema.{name}"][:1]},
        "allowed: names with current, old, ema": {**state, name: state[f"ema.{name}"]},
    }
    for message, values in wrong.items():
        with pytest.raises(ValueError, match=message) as error:
            found.load_state_dict(values)
        assert name in str(error.value)
        assert all(torch.equal(value, before[k]) for k, value in found.state_dict().items())


def test_lora_starts_alike_on_all_processes_and_leaves_the_generator_alone() -> None:
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    first = LoraPolicy(transformer(), SPEC, seed=5)
    torch.manual_seed(2)
    second = LoraPolicy(transformer(), SPEC, seed=5)
    third = LoraPolicy(transformer(), SPEC, seed=6)
    torch.manual_seed(1)
    assert torch.equal(torch.random.get_rng_state(), state)
    pairs = [
        (first.weights(who)[name], value) for who in STORED for name, value in second.weights(who).items()
    ]
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(*(next(iter(p.trainable().values())) for p in (second, third)))


def test_lora_init_is_gaussian_with_deviation_1_over_r() -> None:
    spec = LoraSpec(r=16, alpha=32)
    a = [v.detach() for n, v in LoraPolicy(transformer(), spec).trainable().items() if ".lora_A." in n]
    b = [v.detach() for n, v in LoraPolicy(transformer(), spec).trainable().items() if ".lora_B." in n]
    values = torch.cat([value.flatten() for value in a])
    assert values.std().item() == pytest.approx(1 / 16, rel=4 / (2 * len(values)) ** 0.5)
    assert all(not value.any() for value in b)


def test_lora_adds_alpha_over_r_times_the_product() -> None:
    """Merged into the weights by hand, the adapter is the same network."""
    found = LoraPolicy(transformer(), SPEC)
    move(found)
    merged, state = transformer(), found.weights("current")
    with torch.no_grad():
        for name in {name.rsplit(".lora_", 1)[0] for name in state}:
            a, b = state[f"{name}.lora_A.weight"], state[f"{name}.lora_B.weight"]
            merged.get_submodule(name).weight += SPEC.alpha / SPEC.r * b @ a
    x, t, condition = question()
    torch.testing.assert_close(
        found.velocity("current", x, t, condition),
        merged(x, timestep=t, **condition).sample,
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapters_of_half_precision_networks_are_float32(dtype: torch.dtype) -> None:
    found = LoraPolicy(transformer(dtype), SPEC)
    assert {value.dtype for who in STORED for value in found.named(who).values()} == {torch.float32}
    move(found, size=0.02)
    before = found.weights("old")
    found.follow("old", 0.999)
    assert all(not torch.equal(before[name], value) for name, value in found.named("old").items())
    v, v_old, _ = found.velocities(*question(), reference=False)
    assert v.dtype == dtype
    assert not torch.equal(v, v_old)
    v.float().square().mean().backward()
    grads = [value.grad for value in found.trainable().values()]
    assert all(grad is not None and grad.dtype == torch.float32 and grad.isfinite().all() for grad in grads)


def test_gradients_are_equal_with_checkpointed_layers() -> None:
    """Layers run again in the backward pass, after other policies were asked."""
    grads = []
    for checkpointing in (False, True):
        found = LoraPolicy(transformer(), SPEC)
        move(found)
        found.network.train()
        if checkpointing:
            found.network.enable_gradient_checkpointing()
        v = found.velocities(*question(), reference=True).current
        found.velocity("old", *question())
        found.velocity("reference", *question())
        v.square().mean().backward()
        grads.append([value.grad for value in found.trainable().values()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_an_optimizer_made_while_another_policy_is_selected_trains_the_current_one() -> None:
    found = LoraPolicy(transformer(), SPEC)
    with found.using("old"):
        optimizer = torch.optim.AdamW([p for p in found.network.parameters() if p.requires_grad], lr=0.1)
    before = found.state_dict()
    found.velocity("current", *question()).square().mean().backward()
    optimizer.step()
    changed = {
        k.split(".")[0] for k, value in found.state_dict().items() if not torch.equal(value, before[k])
    }
    assert changed == {"current"}


def test_tensors_that_were_replaced_are_found_again() -> None:
    """As sharding does it."""
    found = LoraPolicy(transformer(), SPEC)
    for module in found.network.modules():
        for name, value in list(module.named_parameters(recurse=False)):
            setattr(module, name, torch.nn.Parameter(value.detach().clone(), value.requires_grad))
    found.rebind()
    before = found.velocity("current", *question())
    move(found)
    after = found.velocity("current", *question())
    assert not torch.equal(before, after)
    after.square().mean().backward()
    assert all(value.grad is not None for value in found.trainable().values())


def test_bad_policies_are_refused() -> None:
    with pytest.raises(ValueError, match=r"target 'attn.to_x' names no linear layer, allowed: .*attn.to_q"):
        LoraPolicy(transformer(), LoraSpec(targets=("attn.to_q", "attn.to_x")))
    found = LoraPolicy(transformer(), SPEC)
    with pytest.raises(ValueError, match="adapters current, old, ema, allowed: none"):
        LoraPolicy(found.network, SPEC)
    with pytest.raises(ValueError, match="'default', allowed: current, old, ema, reference"):
        found.velocity("default", *question())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'current' follows no other"):
        found.follow("current", 0.5)
    with pytest.raises(ValueError, match="bfloat16, allowed in full fine-tuning: float32"):
        FullPolicy(transformer(torch.bfloat16))
    with pytest.raises(ValueError, match="the reference was not kept"):
        FullPolicy(transformer(), reference=False).velocity("reference", *question())
    with pytest.raises(ValueError, match=r"alpha 4\.0, but alpha is 8 here"):
        found.start_from_lora(LoraSpec(r=4, alpha=4.0), found.weights("old"), "a file")
