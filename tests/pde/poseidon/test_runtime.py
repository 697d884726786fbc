"""How the network behaves under checkpointing, compilation, autocast, copying and parallel wrappers."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

from thalweg.pde.poseidon import ScOT, ScOTConfig

CONFIG = ScOTConfig.preset(
    "T", image_size=32, patch_size=2, embed_dim=12, depths=(2, 1), num_heads=(3, 6), skip_connections=(1, 0)
).replace(window_size=8)


def network(**changes: object) -> ScOT:
    torch.manual_seed(3)
    model = ScOT(CONFIG.replace(**changes))
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)
    return model


def batch(size: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    x, y = (torch.randn(size, 4, 32, 32, generator=generator) for _ in range(2))
    return x, torch.rand(size, generator=generator), y


def gradients(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    x, t, y = batch()
    result = model(x, t, labels=y)
    result.loss.backward()
    return result.output.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor], rtol: float = 1e-4) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.allclose(value, b[name], rtol=rtol, atol=rtol * value.abs().max()), name


def test_every_parameter_takes_part_with_conditioning() -> None:
    _, grads = gradients(network())
    assert [n for n, g in grads.items() if not g.any()] == []


def test_gradient_checkpointing_changes_nothing_but_memory() -> None:
    model = network(drop_path_rate=0.3).train()
    torch.manual_seed(5)
    output, grads = gradients(model)
    model.zero_grad()
    model.gradient_checkpointing = True
    torch.manual_seed(5)
    again, grads_again = gradients(model)
    assert torch.equal(output, again)
    assert_same(grads, grads_again, rtol=1e-6)


def test_wrap_modules_are_the_blocks() -> None:
    model = network()
    units = model.wrap_modules()
    assert len(units) == 2 * sum(CONFIG.depths) + sum(CONFIG.skip_connections)
    output, _ = gradients(model)
    apply_activation_checkpointing(model, check_fn=lambda m: m in units)
    wrapped, _ = gradients(model)
    assert torch.equal(output, wrapped)


@pytest.mark.parametrize("training", [True, False])
def test_one_graph_without_breaks(training: bool) -> None:
    model = network(drop_path_rate=0.0).train(training)
    expected, grads = gradients(model)
    model.zero_grad()
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    output, compiled_grads = gradients(compiled)
    assert torch.allclose(output, expected, atol=1e-4)
    assert_same(grads, {n.removeprefix("_orig_mod."): g for n, g in compiled_grads.items()})
    with torch.no_grad():
        x, t, _ = batch()
        assert torch.allclose(compiled(x, t).output, model(x, t).output, atol=1e-4)


def test_resampled_and_masked_inputs_compile_in_one_graph() -> None:
    model = network().eval()
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    x, t, y = batch()
    x, y = (torch.nn.functional.interpolate(f, (48, 40)) for f in (x, y))
    mask = torch.tensor([[False, False, True, False]] * 2)
    with torch.no_grad():
        for arguments in ((x, t), (x, t, mask, y)):
            assert torch.allclose(compiled(*arguments).output, model(*arguments).output, atol=1e-4)


def test_compiled_evaluation_follows_changed_weights() -> None:
    model = network().eval()
    x, t, _ = batch()
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        model(x, t)
        compiled(x, t)
        for p in model.parameters():
            p.data.mul_(1.1)
        assert torch.allclose(compiled(x, t).output, copy.deepcopy(model)(x, t).output, atol=1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:.torch.jit.script_method. is deprecated:DeprecationWarning"
)  # by inductor
@pytest.mark.parametrize("training", [True, False])
def test_inductor_agrees(training: bool) -> None:
    model = network(drop_path_rate=0.0).train(training)
    expected, grads = gradients(model)
    model.zero_grad()
    torch.compiler.reset()
    output, compiled_grads = gradients(torch.compile(model, fullgraph=True))
    assert torch.allclose(output, expected, atol=1e-4)
    assert_same(grads, {n.removeprefix("_orig_mod."): g for n, g in compiled_grads.items()}, rtol=1e-3)


def test_bfloat16_autocast_stays_close_and_leaves_no_trace() -> None:
    model = network().eval()
    x, t, y = batch()
    with torch.no_grad():
        expected = model(x, t).output
        with torch.autocast("cpu", torch.bfloat16):
            half = model(x, t, labels=y)
        again = model(x, t).output
    assert half.output.dtype == torch.float32
    assert half.loss.dtype == torch.float32
    assert torch.equal(expected, again)
    error = (half.output - expected).norm() / expected.norm()
    assert 1e-5 < error < 0.1


def test_bfloat16_autocast_trains() -> None:
    model = network()
    x, t, y = batch()
    with torch.autocast("cpu", torch.bfloat16):
        model(x, t, labels=y).loss.backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


def test_bfloat16_weights_run() -> None:
    model = network().bfloat16().eval()
    x, t, _ = batch()
    with torch.no_grad():
        output = model(x.bfloat16(), t.bfloat16()).output
        expected = network().eval()(x, t).output
    assert output.dtype == torch.bfloat16
    assert (output.float() - expected).norm() / expected.norm() < 0.2


def test_copies_and_the_meta_device_need_nothing_but_the_state() -> None:
    model = network().eval()
    x, t, _ = batch()
    with torch.no_grad():
        expected = model(x, t).output
    with torch.device("meta"):
        empty = ScOT(model.config)
    empty.to_empty(device="cpu").load_state_dict(copy.deepcopy(model).state_dict())
    assert list(model.buffers()) == []
    with torch.no_grad():
        assert torch.equal(empty.eval()(x, t).output, expected)


@pytest.mark.parametrize("training", [True, False])
def test_hooks_on_layers_are_called(training: bool) -> None:
    """Adapters and quantisation replace or wrap these layers; the fused paths must not bypass them."""
    layers = {
        "query",
        "key",
        "value",
        "dense",
        "pwconv1",
        "pwconv2",
        "dwconv",
        "reduction",
        "upsample",
        "mixup",
    }
    model = network().train(training)
    expected, _ = gradients(model)
    called = set()
    hooked = {n for n, m in model.named_modules() if n.split(".")[-1] in layers and hasattr(m, "weight")}
    for name in hooked:
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: called.add(name))
    output, _ = gradients(model)
    assert called == hooked
    assert torch.allclose(output, expected, atol=1e-4)


def test_functional_calls_see_their_own_parameters() -> None:
    model = network().eval()
    x, t, _ = batch()
    other = {n: p * 1.2 for n, p in model.named_parameters()}
    with torch.no_grad():
        model(x, t)
        swapped = torch.func.functional_call(model, other, (x, t)).output
        model.load_state_dict(other)
        assert torch.allclose(swapped, model(x, t).output)


def test_samples_do_not_influence_each_other() -> None:
    model = network().eval().double()
    x, t, _ = batch(3)
    with torch.no_grad():
        together = model(x.double(), t).output
        single = torch.cat([model(x[i : i + 1].double(), t[i : i + 1]).output for i in range(3)])
    assert torch.allclose(together, single, atol=1e-10)


def test_mask_token_replaces_the_marked_patches() -> None:
    model = network(use_mask_token=True).eval()
    x, t, _ = batch(1)
    marked = torch.zeros(1, 256, dtype=torch.bool)
    marked[:, 16 * 3 + 5] = True
    changed = x.clone()
    changed[:, :, 6:8, 10:12] += 5.0
    with torch.no_grad():
        same = [model(f, t, bool_masked_pos=marked).output for f in (x, changed)]
        plain = [model(f, t).output for f in (x, changed)]
    assert torch.equal(*same)
    assert not torch.allclose(*plain)
    with pytest.raises(ValueError, match="use_mask_token"):
        network()(x, t, bool_masked_pos=marked)


def test_stochastic_depth_keeps_the_expectation() -> None:
    block = network(drop_path_rate=0.5).encoder.layers[0].blocks[1]
    rate = block.drop_path.rate
    assert rate == pytest.approx(0.5 * 1 / 5)
    kept = block.drop_path.train()(torch.ones(20_000, 2, 2))
    assert kept.unique().tolist() == pytest.approx([0.0, 1 / (1 - rate)])
    assert kept.mean().item() == pytest.approx(1.0, abs=0.02)
    assert torch.equal(kept[:, 0, 0], kept[:, 1, 1])


def test_wrong_inputs_are_explained() -> None:
    model = network()
    x, t, y = batch()
    with pytest.raises(ValueError, match=r"expected \(batch, 4, H, W\).*replace_embedding_recovery"):
        model(x[:, :3], t)
    with pytest.raises(ValueError, match=r"expected \(2,\)"):
        model(x, torch.zeros(3))
    with pytest.raises(ValueError, match="lead time"):
        model(x, None)
    with pytest.raises(ValueError, match="pass labels"):
        model(x, t, pixel_mask=torch.zeros(2, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="differ in shape"):
        model(x, t, labels=y[:, :3])
