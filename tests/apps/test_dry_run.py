"""``thalweg fit ... --dry-run`` says what a run needs, builds nothing, and fails where the run would."""

from pathlib import Path

import pytest
import torch
import yaml
from tiny_policy import pipeline

from thalweg.apps import cli, plan, trainer_cli
from thalweg.apps.dry_run import GIB

ROOT = trainer_cli.shipped_configs()


def dry(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    cli.main(["fit", *argv, "--dry-run"])
    return capsys.readouterr().out


def row(text: str, name: str) -> str:
    """What a line of a table says of a name."""
    line = next(line for line in text.splitlines() if line.strip().startswith(name))
    return " ".join(line.strip()[len(name) :].split())


def numbers(text: str, name: str) -> list[float]:
    return [float(word) for word in row(text, name).split()]


@pytest.fixture
def online(tmp_path: Path) -> Path:
    """Configuration of a run on a tiny pipeline."""
    pipeline(tmp_path).save_pretrained(tmp_path / "pipe")
    config = {
        "model": {
            "class_path": "thalweg.diffusion.nft.module.NFTModule",
            "init_args": {
                "pipeline": {"model": str(tmp_path / "pipe")},
                "policy": {"lora": {"r": 4, "alpha": 8}},
                "rewards": {"jpeg_compressibility": {}},
                "rollout": {"steps": 5},
                "times": {"count": 2},
                "optim": {"lr": 1e-3, "schedule": {"name": "constant"}},
            },
        },
        "data": {
            "class_path": "thalweg.diffusion.nft.data.PromptDataModule",
            "init_args": {"prompts": "nowhere.txt", "groups": 4, "group_size": 6, "batch_size": 3},
        },
        "trainer": {"accelerator": "cpu", "max_epochs": 1},
    }
    path = tmp_path / "online.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def test_online_run(
    online: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(online.parent)
    out = dry(["--config", str(online)], capsys)
    assert row(out, "images") == "24 = 4 groups of 6"
    assert row(out, "micro-batches of a process") == "8 of 3 images"
    assert row(out, "backward passes of a step") == "16 on a process, 2 times of each image"
    assert row(out, "network evaluations of images, rollout") == "120 = 5 for each"
    assert row(out, "the same, training") == "144 forward, 48 backward"
    assert len(numbers(out, "total")) == 3  # nothing is evaluated
    assert "to be there before training: nowhere.txt" in out
    assert "this machine has" in out
    assert row(dry(["--config", str(online), "--model.rewards={pickscore: {}}"], capsys), "rewards")
    served = "--model.rewards={geneval: {detector: remote, url: somewhere}}"
    assert "\n  rewards " not in dry(["--config", str(online), served], capsys)
    assert not list(online.parent.glob("runs"))
    judged = dry(["--config", str(online), "--data.val_prompts=shapes", "--data.num_val=40"], capsys)
    assert len(numbers(judged, "total")) == 4
    pending = "images that wait for rewards"
    assert numbers(judged, pending)[1] == pytest.approx(2 * 16 * 3 * 16 * 16 * 4 / 2**20, abs=0.01)
    twice = dry(
        ["--config", str(online), "--trainer.devices", "2", "--model.objective.kl_weight", "0"], capsys
    )
    assert row(twice, "micro-batches of a process") == "4 of 3 images"
    assert row(twice, "the same, training") == "96 forward, 48 backward"
    assert numbers(twice, "gradients")[0] == pytest.approx(2 * numbers(out, "gradients")[0], abs=0.01)


def test_policy_gradients_train_on_steps_with_noise(online: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = yaml.safe_load(online.read_text())
    config["model"]["class_path"] = "thalweg.diffusion.nft.module.FlowGRPOModule"
    online.write_text(yaml.safe_dump(config))
    out = dry(["--config", str(online)], capsys)
    assert row(out, "backward passes of a step") == "32 on a process, 4 times of each image"
    assert row(out, "the same, training") == "192 forward, 96 backward"


def test_errors_are_those_of_fit(online: Path) -> None:
    for argv, message in (
        (["--config", str(online), "--model.beta", "3"], "beta"),
        (["--config", str(online), "--model.rollout.steps", "0"], "steps is 0, allowed: 1 and more"),
        (["--config", str(online), "--data.group_size", "1"], "group_size is 1"),
        (["--config", str(online), "--trainer.devices", "5"], "world_size is 5, allowed: 1 to 4"),
        (["--config", str(online), "--model.pipeline.model", "some/model"], "known: stabilityai/"),
        (["--config", str(online), "--model.rewards={pick: {}}"], "reward 'pick' is unknown, allowed: jpeg"),
        (["--config", str(online), "--model.rewards={ocr: {size: 3}}"], "reward 'ocr' with options ['size']"),
        (
            ["--config", str(online), "--model.policy.kind=full", "--model.pipeline.dtype=bfloat16"],
            "allowed in full fine-tuning: float32",
        ),
        (["--config", "nothing.yaml"], "no configuration file 'nothing.yaml'"),
        ([], "nothing to fit"),
    ):
        with pytest.raises(SystemExit) as caught:
            cli.main(["fit", *argv, "--dry_run"])
        assert message in str(caught.value.code)
    with pytest.raises(SystemExit, match="--dry-run says what a fit would need; test has no such option"):
        cli.main(["test", "--app", "poseidon", "--dry-run"])


def test_networks_trained_whole(capsys: pytest.CaptureFixture[str]) -> None:
    out = dry(
        ["--config", "poseidon/pretrain_T.yaml", "--config", "trainer/ddp.yaml", "--trainer.devices=8"],
        capsys,
    )
    assert "20,774,444 parameters, 20,774,444 of them trained; 8 GPUs, no autocast" in out
    mib = 20_774_444 * 4 / 2**20
    for name, times in (("gradients", 1), ("optimizer", 2), ("buckets of gradients", 1)):
        assert numbers(out, name)[0] == pytest.approx(times * mib, abs=0.02)
    assert numbers(out, "weights")[0] >= mib - 0.01
    app = dry(["--app", "s3", "--config", "trainer/cpu.yaml"], capsys)
    assert "1,114,209 parameters" in app
    assert row(app, "average of weights") == row(app, "weights")


def test_nothing_is_built(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A network of 628 million parameters has 2.3 GiB of weights; none of them is allocated."""
    made = []
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, *args, **kwargs: made.append(self))
    before = torch.get_rng_state()
    out = dry(["--config", "poseidon/pretrain_L.yaml"], capsys)
    assert "628,575,524 parameters" in out
    assert not made
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("trainer", "expected"),
    [
        (
            {"accelerator": "gpu", "devices": 8, "num_nodes": 2, "precision": "16-mixed"},
            (True, 16, torch.float16),
        ),
        ({"accelerator": "cuda", "devices": "0,3"}, (True, 2, None)),
        ({"accelerator": "gpu", "devices": [1]}, (True, 1, None)),
        ({"accelerator": "cpu", "devices": "auto", "precision": "bf16-mixed"}, (False, 1, torch.bfloat16)),
        ({"accelerator": "cpu", "devices": "2"}, (False, 2, None)),
    ],
)
def test_devices(trainer: dict, expected: tuple) -> None:
    found = plan.devices(trainer)
    assert (found.gpu, found.processes, found.autocast) == expected


def test_strategies_that_split_weights() -> None:
    assert plan.devices(
        {"strategy": {"class_path": "lightning.pytorch.strategies.ModelParallelStrategy"}}
    ).sharded
    assert plan.devices({"strategy": "fsdp"}).sharded
    assert not plan.devices({"strategy": "ddp"}).sharded


NFT = sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "nft").glob("*.yaml"))
PUBLISHED = {
    # prompts, rewards, beta, decay, steps, optimizer steps, backward passes of one, batch of evaluations
    "sd35_geneval": ("geneval", ["geneval"], 1.0, "linear_to_0_5", 10, 1, 16 * 9, 14),
    "sd35_ocr": ("data/ocr", ["ocr"], 0.1, "delayed_linear_to_0_999", 10, 2, 8 * 9, 16),
    "sd35_pickscore": ("data/pickscore", ["pickscore"], 1.0, "linear_to_0_5", 10, 1, 16 * 9, 16),
    "sd35_hpsv2": ("data/pickscore", ["hpsv2"], 1.0, "linear_to_0_5", 10, 1, 16 * 9, 16),
    "sd35_multi_reward": (
        "data/pickscore", ["pickscore", "hpsv2", "clipscore"], 0.1, "linear_to_0_5", 25, 1, 16 * 24, 16,
    ),
}  # fmt: skip
STAGES = [("1_pickscore", 800), ("2_geneval", 300), ("3_pickscore", 200), ("4_geneval", 200), ("5_ocr", 100)]


def read(name: str) -> tuple[dict, dict, dict]:
    config = yaml.safe_load((ROOT / "nft" / f"{name}.yaml").read_text())
    return config["model"]["init_args"], config["data"]["init_args"], config["trainer"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_settings(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    prompts, rewards, beta, decay, steps, gradient_steps, accumulation, evaluated = PUBLISHED[name]
    model, data, trainer = read(name)
    assert data["prompts"].startswith(prompts)
    assert list(model["rewards"]) == rewards
    assert not any("weight" in spec for spec in model["rewards"].values())  # 1 each
    assert model["objective"]["beta"] == beta
    assert model["decay"] == decay
    assert model["rollout"]["steps"] == steps
    assert data["gradient_steps"] == gradient_steps
    assert model["evaluation"]["batch_size"] == data["eval_batch_size"] == evaluated
    assert model["pipeline"]["model"] == "stabilityai/stable-diffusion-3.5-medium"
    assert (model["rollout"]["height"], model["rollout"]["width"]) == (512, 512)
    assert (data["groups"], data["group_size"], data["sampler"]) == (48, 24, "krepeat")
    assert (model["optim"]["lr"], model["optim"]["weight_decay"]) == (3e-4, 1e-4)
    assert model["objective"]["kl_weight"] == 1e-4
    assert model["objective"]["adv_clip_max"] == 5
    assert (model["policy"]["lora"]["r"], model["policy"]["lora"]["alpha"]) == (32, 64)
    assert (model["rollout"]["solver"], model["rollout"]["legacy_dpm2"]) == ("dpm2", True)
    assert model["rollout"]["guidance"] == 1
    assert model["evaluation"]["rollout"] == {"solver": "flow", "steps": 40, "height": 512, "width": 512}
    assert (trainer["devices"], trainer["precision"]) == (8, "16-mixed")
    assert model["max_grad_norm"] == 1
    out = dry(["--config", f"nft/{name}.yaml"], capsys)
    assert row(out, "micro-batches of a process") == "16 of 9 images"
    assert row(out, "backward passes of a step").split()[0] == str(accumulation)
    assert row(out, "images") == "1,152 = 48 groups of 24"
    assert "18,776,064 parameters are trained; 8 GPUs, float16 autocast" in out


def test_stages_follow_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    first, *_ = read("sd35_multi_reward")
    before = None
    for name, epochs in STAGES:
        model, data, trainer = read(f"multi_reward_{name}")
        assert trainer["max_epochs"] == epochs
        assert model["policy"].get("start_from") == before
        assert model["objective"] == first["objective"]
        assert model["rollout"] == first["rollout"]
        same = "pickscore" in name
        assert (model["rewards"] == first["rewards"]) == same
        before = f"runs/multi_reward_{name}/lora"
        assert f"--to {before}" in (ROOT / "nft" / f"multi_reward_{name}.yaml").read_text()
        assert data["val_prompts"].split("/")[1] == name.split("_")[1]
    out = dry(["--config", "nft/multi_reward_5_ocr.yaml"], capsys)
    assert "runs/multi_reward_4_geneval/lora" in out.splitlines()[-2]


@pytest.mark.slow
@pytest.mark.parametrize("size", [24, 80])
def test_variants_fit_their_gpu(size: int, capsys: pytest.CaptureFixture[str]) -> None:
    out = dry(["--config", f"nft/sd35_geneval_{size}gb.yaml"], capsys)
    assert "1 GPU, bfloat16 autocast" in out
    assert f"fits GPUs of {size} GB and more" in out
    assert max(numbers(out, "total")) * GIB < size * 1e9
    assert row(out, "images") == "1,152 = 48 groups of 24"
    published, variant = read("sd35_geneval"), read(f"sd35_geneval_{size}gb")
    for key in ("objective", "decay", "times", "optim", "policy", "max_grad_norm"):
        assert published[0][key] == variant[0][key]
    slips = {"legacy_bgr": True, "reference_quirks": True}
    assert published[0]["rewards"]["geneval"] == variant[0]["rewards"]["geneval"] | slips


def test_every_config_is_named_here() -> None:
    known = {
        *PUBLISHED,
        *(f"multi_reward_{name}" for name, _ in STAGES),
        "sd35_geneval_24gb",
        "sd35_geneval_80gb",
    }
    assert {Path(name).stem for name in NFT if "sd35" in name or "multi_reward" in name} == known
