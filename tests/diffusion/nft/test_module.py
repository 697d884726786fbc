"""Online fine-tuning through Lightning: what an epoch is, that it resumes, and what it refuses."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from nft_runs import OBJECTIVES, fit, folder_of_pipeline, module, prompts, trainer, whole

from thalweg.diffusion.nft.config import (
    AWMObjective,
    EvaluationConfig,
    GRPOObjective,
    NFTObjective,
    PolicyConfig,
    RolloutConfig,
)
from thalweg.diffusion.nft.data import EvalLoader, PromptDataModule
from thalweg.diffusion.nft.geometry import geometry
from thalweg.diffusion.nft.module import FlowGRPOModule, NFTModule
from thalweg.diffusion.nft.online import OnlineModule
from thalweg.diffusion.nft.prompt_sets import Prompt
from thalweg.diffusion.nft.training import steps_of_epoch
from thalweg.diffusion.rewards.base import RewardError

pytestmark = [
    pytest.mark.filterwarnings("ignore:Found .* in eval mode"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists"),
]
KINDS = pytest.mark.parametrize("kind", list(OBJECTIVES), ids=lambda kind: kind.__name__)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nft")
    folder_of_pipeline(folder)
    return folder


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@KINDS
def test_an_epoch_changes_the_policies_and_nothing_else(home: Path, kind: type[OnlineModule]) -> None:
    start = module(home, kind)
    start.trainer = trainer(home)
    start.trainer.datamodule = prompts(home)
    start.configure_model()
    before = whole(start)
    frozen = {k: v.clone() for k, v in start.scene.network.named_parameters() if "lora" not in k}
    found = fit(home, kind, epochs=2)
    after = whole(found)
    # the last block's answers about the text go nowhere: their queries have gradients of zero
    idle = {f"{who}.transformer_blocks.2.attn.add_q_proj.lora_B.weight" for who in ("current", "old", "ema")}
    for name, value in before.items():
        assert torch.equal(after[name], value) == (name in idle) or "lora_A" in name, name
    now = dict(found.scene.network.named_parameters())
    assert all(torch.equal(now[name], value) for name, value in frozen.items())
    assert found.global_step == 4  # two steps in each of two epochs
    assert {"train/reward", "train/total_loss", "val/reward"} <= set(found.trainer.callback_metrics)


@KINDS
def test_a_resumed_run_equals_a_straight_one(home: Path, tmp_path: Path, kind: type[OnlineModule]) -> None:
    straight = fit(home, kind, epochs=4)
    file = tmp_path / "half.ckpt"
    fit(home, kind, epochs=2, save=file)
    saved = torch.load(file, weights_only=True)
    assert all(name.split(".")[1] in ("current", "old", "ema") for name in saved["state_dict"])
    resumed = fit(home, kind, epochs=4, resume=file)
    assert same(whole(resumed), whole(straight))
    optimizers = [m.trainer.optimizers[0].state_dict()["state"] for m in (resumed, straight)]
    assert all(same(optimizers[0][i], optimizers[1][i]) for i in optimizers[1])
    metrics = [m.trainer.callback_metrics for m in (resumed, straight)]
    for name, value in metrics[1].items():
        assert "seconds" in name or torch.equal(metrics[0][name], value), name


def test_full_fine_tuning_resumes_as_well(home: Path, tmp_path: Path) -> None:
    changes = {"policy": PolicyConfig(kind="full")}
    straight = fit(home, epochs=2, **changes)
    fit(home, epochs=1, save=tmp_path / "half.ckpt", **changes)
    resumed = fit(home, epochs=2, resume=tmp_path / "half.ckpt", **changes)
    assert same(whole(resumed), whole(straight))


def test_images_do_not_depend_on_how_many_are_drawn_at_once(home: Path) -> None:
    small, large = (
        fit(home, epochs=1, gradient_steps=1, rollout=RolloutConfig(steps=3, batch_size=size))
        for size in (3, 16)
    )
    a, b = (m.trainer.callback_metrics for m in (small, large))
    for name in ("train/reward", "train/reward_std", "train/grad_norm", "train/x0_norm"):
        assert torch.allclose(a[name], b[name], rtol=5e-4), name  # sums in another order


def test_micro_batches_only_split_the_work(home: Path) -> None:
    small, large = (fit(home, epochs=1, gradient_steps=1, batch_size=size) for size in (2, 16))
    a, b = (m.trainer.callback_metrics["train/grad_norm"] for m in (small, large))
    assert torch.allclose(a, b, rtol=5e-4)  # sums in another order


def test_the_reference_is_not_asked_where_nothing_needs_it(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from thalweg.diffusion.nft.policy import Policy

    asked: list[str] = []
    velocity = Policy.velocity

    def noted(self: Policy, who: Any, *given: Any) -> torch.Tensor:
        asked.append(who)
        return velocity(self, who, *given)

    monkeypatch.setattr(Policy, "velocity", noted)
    fit(home, epochs=1, objective=NFTObjective(kl_weight=0.0), decay="hard_copy", gradient_steps=1)
    assert asked == ["current"] * 4  # two micro-batches at two times; the old policy still equals the current
    asked.clear()
    fit(home, epochs=1, objective=NFTObjective(kl_weight=0.0), gradient_steps=2)
    assert asked == ["current"] * 2 + ["old", "current"] * 2


def test_gradients_are_clipped_after_a_scaler_has_unscaled_them(home: Path) -> None:
    precision = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**10))
    plain, scaled = (
        fit(home, epochs=1, gradient_steps=1, max_grad_norm=1e-5, plugins=plugins)
        for plugins in ([], [precision])
    )
    norms = [m.trainer.callback_metrics["train/grad_norm"] for m in (plain, scaled)]
    assert torch.allclose(norms[0], norms[1], rtol=0.05)
    assert norms[0] > 3e-4  # far above the limit
    assert scaled.trainer.precision_plugin.scaler.get_scale() == 2.0**10  # nothing overflowed
    assert not same(whole(scaled), whole(plain))


def test_evaluations_do_not_depend_on_batches(home: Path) -> None:
    found = [
        trainer(home).validate(module(home), datamodule=prompts(home, eval_batch_size=n), verbose=False)[0]
        for n in (2, 5)
    ]
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_prompts_of_an_evaluation_are_dealt_to_all_processes_once() -> None:
    prompts = [Prompt(text=str(i)) for i in range(7)]
    loaders = [EvalLoader(prompts, 2, rank, 3) for rank in range(3)]
    assert len({len(list(loader)) for loader in loaders}) == 1
    kept = [
        number
        for loader in loaders
        for batch in loader
        for number, yes in zip(batch["numbers"], batch["kept"], strict=True)
        if yes
    ]
    assert sorted(kept) == list(range(7))


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_optimizer_steps_take_the_same_images_on_any_number_of_processes(steps: int) -> None:
    shapes = [geometry(6, 4, world, 4, steps) for world in (1, 2, 3)]
    found = []
    for shape in shapes:
        taken: list[set[int]] = [set() for _ in range(steps)]
        for rank in range(shape.world_size):
            numbers = [4 * group + copy for group in shape.groups_of(rank) for copy in range(4)]
            for i, positions in enumerate(steps_of_epoch(numbers, shape, seed=1, epoch=2)):
                assert len(positions) == len(numbers) // steps
                taken[i] |= {numbers[p] for p in positions}
        found.append(taken)
    assert found[0] == found[1] == found[2]
    assert set.union(*found[0]) == set(range(24))


def test_a_loader_goes_on_with_the_next_epoch(home: Path) -> None:
    data = prompts(home)
    data.setup()
    loader = data.train_dataloader()
    plans = [next(iter(loader)) for _ in range(3)]
    assert [plan["epoch"] for plan in plans] == [0, 1, 2]
    assert all(plan["numbers"] == list(range(16)) for plan in plans)
    assert all(len(set(plan["groups"])) == 4 for plan in plans)
    again = prompts(home)
    again.load_state_dict(data.state_dict())
    again.setup()
    assert next(iter(again.train_dataloader())) == loader.plan(3)


@pytest.mark.parametrize(
    ("reward", "text"),
    [("nan", "gave nan for 16 of 16 images"), ("failing", "failed in its only try.*no server at port 9")],
)
def test_a_reward_that_cannot_be_had_ends_the_run(home: Path, reward: str, text: str) -> None:
    rewards = {"broken": {"reward": f"nft_runs:{reward}"}}
    with pytest.raises(RewardError, match=text.replace("16 of 16", "8 of 8")):
        fit(home, epochs=1, rewards=rewards, reward_retries=0)


def test_a_constant_reward_is_warned_of(home: Path) -> None:
    with pytest.warns(UserWarning, match=r"all 16 rewards of this epoch are 0\.5"):
        fit(home, epochs=1, rewards={"constant": {"reward": "nft_runs:constant"}})


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"rewards": {"beauty": {}}}, "reward 'beauty' is unknown"),
        ({"held_out": {"brightness": {}}}, "'brightness' is trained on and held out"),
        ({"decay": "slow"}, "decay is 'slow', allowed: hard_copy"),
        ({"max_grad_norm": 0.0}, r"max_grad_norm is 0\.0"),
        ({"rollout": RolloutConfig(solver="nowhere")}, "nowhere is neither the folder"),
        ({"rollout": RolloutConfig(steps=3, height=18)}, "height is 18, allowed: multiples of 4"),
        (
            {"evaluation": EvaluationConfig(rollout=RolloutConfig(solver="none"))},
            "none is neither the folder",
        ),
        ({"policy": PolicyConfig(start_from="nowhere")}, "nowhere has no LoRA"),
    ],
)
def test_settings_that_cannot_be_are_refused(home: Path, changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        fit(home, epochs=1, **changes)


@pytest.mark.parametrize(
    ("kind", "changes", "text"),
    [
        (NFTObjective, {"beta": 0.0}, "beta is 0"),
        (NFTObjective, {"adv_mode": "best"}, "adv_mode is 'best', allowed: all, positive_only"),
        (NFTObjective, {"kl_weight": -1.0}, "kl_weight is -1"),
        (AWMObjective, {"weighting": "x"}, "weighting is 'x', allowed: uniform"),
        (AWMObjective, {"power": 0.0}, "power is 0"),
        (GRPOObjective, {"eta": 0.0}, "eta is 0"),
        (GRPOObjective, {"adv_clip_max": 0.0}, "adv_clip_max is 0"),
        (RolloutConfig, {"steps": 0}, "steps is 0"),
        (EvaluationConfig, {"who": "old"}, "who is 'old', allowed: ema, current"),
        (PolicyConfig, {"kind": "dora"}, "kind is 'dora', allowed: lora, full"),
    ],
)
def test_settings_are_checked_before_anything_is_loaded(
    kind: Any, changes: dict[str, Any], text: str
) -> None:
    with pytest.raises(ValueError, match=text):
        kind(**changes)


def test_windows_of_noise_are_checked(home: Path) -> None:
    with pytest.raises(ValueError, match=r"window is \(0, 3\), allowed for 3 steps: 0 <= first < end <= 2"):
        fit(home, FlowGRPOModule, epochs=1, objective=GRPOObjective(window=(0, 3)))


def test_other_data_modules_are_refused(home: Path) -> None:
    found = module(home)
    found.trainer = trainer(home)
    with pytest.raises(ValueError, match=r"needed: thalweg\.diffusion\.nft\.data\.PromptDataModule"):
        _ = found.prompts


def test_checkpoints_of_other_adapters_are_refused(home: Path, tmp_path: Path) -> None:
    from thalweg.diffusion.nft.lora import LoraSpec

    fit(home, epochs=1, save=tmp_path / "some.ckpt")
    other = PolicyConfig(lora=LoraSpec(r=2, alpha=4))
    with pytest.raises(ValueError, match=r"lora_A\.weight' of shape \(4, 16\), needed: \(2, 16\)"):
        fit(home, epochs=2, policy=other, resume=tmp_path / "some.ckpt")


def test_generated_prompts_need_a_number() -> None:
    data = PromptDataModule("geneval")
    with pytest.raises(ValueError, match="say how many"):
        data.setup()
    data = PromptDataModule("geneval", num_prompts=20, val_prompts="shapes", num_val=12)
    data.setup()
    assert len(data.texts()) == 32


def test_the_authors_sampler_trains_too(home: Path) -> None:
    found = fit(home, NFTModule, epochs=1, sampler="krepeat", gradient_steps=1)
    assert found.trainer.callback_metrics["train/groups"] <= 4


def test_checkpointed_activations_change_no_gradient(home: Path) -> None:
    plain, checkpointed = (
        fit(home, epochs=1, gradient_steps=1, pipeline={"gradient_checkpointing": on}) for on in (False, True)
    )
    assert same(whole(plain), whole(checkpointed))


def test_prompts_can_be_encoded_before_training_and_their_encoders_freed(home: Path) -> None:
    early, late = (fit(home, epochs=1, pipeline={"encode_all": on}) for on in (True, False))
    assert not early.scene.has_encoders
    assert same(whole(early), whole(late))


def test_half_precision_of_frozen_weights_leaves_adapters_in_float32(home: Path) -> None:
    found = fit(home, epochs=1, gradient_steps=1, pipeline={"dtype": "bfloat16"})
    assert found.scene.network.dtype == torch.bfloat16
    assert {value.dtype for value in whole(found).values()} == {torch.float32}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute")
def test_compiled_blocks_train_as_they_do_otherwise(home: Path) -> None:
    torch.compiler.reset()
    plain, compiled = (
        fit(home, epochs=1, gradient_steps=1, pipeline={"compile": on}) for on in (False, True)
    )
    a, b = (m.trainer.callback_metrics for m in (plain, compiled))
    for name in ("train/reward", "train/grad_norm", "train/total_loss"):
        assert torch.allclose(a[name], b[name], rtol=2e-3), name
    assert compiled.scene.network.transformer_blocks[0]._compiled_call_impl is not None


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_a_gpu_trains_too(home: Path, precision: str) -> None:
    found = fit(home, epochs=2, accelerator="gpu", precision=precision)
    assert {value.device.type for value in found.policy.named("old").values()} == {"cuda"}
    assert torch.isfinite(found.trainer.callback_metrics["train/reward"])
