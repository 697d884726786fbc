"""Built optimizers: equal to torch's AdamW, equal after resume, usable by Lightning with clipping."""

import copy
import io
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from thalweg.core_optim.build import OPTIMIZERS, Optimization, build
from thalweg.core_optim.config import GroupRule, OptimConfig, ScheduleConfig

RULES = [GroupRule(name="bias", pattern="bias", weight_decay=0.0, lr=3e-2)]
CONFIG = OptimConfig(lr=1e-2, weight_decay=0.1, groups=RULES, schedule=ScheduleConfig(warmup_steps=2))


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 8), nn.GELU(), nn.Linear(8, 2))


def train(net: nn.Module, built: Optimization, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(4, 3, generator=generator)
        built["optimizer"].zero_grad()
        net(x).square().mean().backward()
        built["optimizer"].step()
        built["lr_scheduler"]["scheduler"].step()


@pytest.mark.parametrize("kernel", ["auto", "fused", "foreach", "loop"])
def test_each_kernel_is_adamw(kernel: str) -> None:
    """Reference: torch's loop implementation with groups and rates set by hand."""
    ours, reference = network(), network()
    config = OptimConfig(lr=1e-2, weight_decay=0.1, groups=RULES, kernel=kernel, schedule=CONFIG.schedule)
    built = build(ours, config, 6)
    parts: dict[bool, list[Tensor]] = {True: [], False: []}
    for name, parameter in reference.named_parameters():
        parts["bias" in name].append(parameter)
    adamw = torch.optim.AdamW(
        [{"params": parts[True], "lr": 3e-2, "weight_decay": 0.0}, {"params": parts[False], "lr": 1e-2}],
        weight_decay=0.1,
        foreach=False,
    )
    for step in range(6):
        rate = step / 2 if step < 2 else 0.5 * (1 + math.cos(math.pi * (step - 2) / 4))
        adamw.param_groups[0]["lr"], adamw.param_groups[1]["lr"] = 3e-2 * rate, 1e-2 * rate
        train(ours, built, range(step, step + 1))
        generator = torch.Generator().manual_seed(step)
        adamw.zero_grad()
        reference(torch.randn(4, 3, generator=generator)).square().mean().backward()
        adamw.step()
    for a, b in zip(ours.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_resumed_run_equals_straight_run_bitwise(name: str) -> None:
    config = OptimConfig(name=name, lr=1e-2, weight_decay=0.1, groups=RULES, schedule=CONFIG.schedule)
    straight = network()
    train(straight, build(straight, config, 6), range(6))

    first = network()
    built = build(first, config, 6)
    train(first, built, range(3))
    file = io.BytesIO()
    torch.save(
        {
            "net": first.state_dict(),
            "optimizer": built["optimizer"].state_dict(),
            "scheduler": built["lr_scheduler"]["scheduler"].state_dict(),
        },
        file,
    )
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    second = network()
    built = build(second, config, 6)
    second.load_state_dict(saved["net"])
    built["optimizer"].load_state_dict(saved["optimizer"])
    built["lr_scheduler"]["scheduler"].load_state_dict(saved["scheduler"])
    train(second, built, range(3, 6))
    for a, b in zip(straight.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


RATES = {"sgd": 0.5, "sgdp": 0.5, "mfac": 0.05, "scion": 3e-3}
"""Learning rates where that of Adam's family does not do; the loss falls by 20 in 200 steps with them."""
OPTIONS = {"mfac": {"damping": 0.1}}
"""M-FAC's published damping of 1e-5 wants gradients of large batches."""


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_every_optimizer_lowers_a_loss(name: str) -> None:
    net = network()
    probe = torch.randn(64, 3, generator=torch.Generator().manual_seed(5))
    before = net(probe).square().mean().item()
    rate, options = RATES.get(name, 1e-2), OPTIONS.get(name, {})
    config = OptimConfig(name=name, lr=rate, options=options, schedule=ScheduleConfig(name="constant"))
    train(net, build(net, config, None), range(200))
    assert net(probe).square().mean().item() < 0.05 * before


def test_unknown_optimizer_lists_the_known_and_the_near() -> None:
    with pytest.raises(
        ValueError, match=r"'AdamV' is unknown, allowed: .*adamw.*mezo.*did you mean adamw or"
    ):
        build(network(), OptimConfig(name="AdamV"), 1)


@pytest.mark.parametrize("endless", [None, -1, math.inf])
def test_endless_run_needs_a_constant_schedule(endless: float | None) -> None:
    with pytest.raises(ValueError, match=r"schedule 'cosine' needs the number of optimizer steps"):
        build(network(), OptimConfig(), endless)
    constant = OptimConfig(schedule=ScheduleConfig(name="constant"))
    assert build(network(), constant, endless)["lr_scheduler"]["interval"] == "step"


def test_warmup_longer_than_the_run_warns() -> None:
    config = OptimConfig(schedule=ScheduleConfig(warmup_steps=10))
    with pytest.warns(UserWarning, match="warm-up of 10 steps is longer than the run of 4 steps"):
        build(network(), config, 4)


def test_schedule_scales_all_groups_together() -> None:
    net = network()
    built = build(net, CONFIG, 6)
    ratios = []
    for step in range(6):
        bias, rest = (group["lr"] for group in built["optimizer"].param_groups)
        ratios.append(bias / rest if rest else 3.0)
        train(net, built, range(step, step + 1))
    assert ratios == pytest.approx([3.0] * 6)


def test_state_survives_a_deep_copy() -> None:
    """Lightning and EMA callbacks copy modules and optimizers."""
    built = build(network(), CONFIG, 6)
    assert copy.deepcopy(built["optimizer"]).param_groups[0]["name"] == "bias"


def test_fused_kernel_obeys_loss_scaling_and_clipping() -> None:
    """Scaled loss, unscaled and clipped gradients: the same weights as without any scaling."""

    def run(kernel: str, scale: float) -> nn.Module:
        net = network()
        config = OptimConfig(lr=1e-2, kernel=kernel, schedule=ScheduleConfig(name="constant"))
        optimizer = build(net, config, None)["optimizer"]
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        for step in range(4):
            x = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            scaler.scale(net(x).square().mean()).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(net.parameters(), 0.01)
            scaler.step(optimizer)
            scaler.update()
        return net

    reference = run("loop", 1.0)
    for a, b in zip(run("fused", 2.0**12).parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)`:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_lightning_clips_gradients_under_mixed_precision(tmp_path: Path) -> None:
    """Lightning refuses to clip for optimizers that announce to unscale by themselves."""
    import lightning as L
    from torch.utils.data import DataLoader, TensorDataset

    norms = []

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            return 100.0 * self.net(batch[0]).square().mean()

        def configure_optimizers(self) -> Optimization:
            return build(self, CONFIG, self.trainer.estimated_stepping_batches)

        def on_before_zero_grad(self, optimizer: torch.optim.Optimizer) -> None:
            grads = [p.grad for p in self.parameters() if p.grad is not None]
            if grads:
                norms.append(torch.nn.utils.get_total_norm(grads).item())

    trainer = L.Trainer(
        max_steps=3, accelerator="cpu", precision="bf16-mixed", gradient_clip_val=0.5, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=str(tmp_path),
    )  # fmt: skip
    module = Module()
    trainer.fit(module, DataLoader(TensorDataset(torch.randn(12, 3)), batch_size=4))
    assert trainer.global_step == 3
    assert norms
    assert max(norms) <= 0.5 + 1e-3
    assert type(trainer.optimizers[0]).__name__ == "AdamW"
