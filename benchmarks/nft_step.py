"""The training half of an epoch of DiffusionNFT: ours against the structure of the authors' program.

    python benchmarks/nft_step.py
    python benchmarks/nft_step.py --devices 2     # with a second process, gloo between them
    python benchmarks/nft_step.py --published     # operations of SD3.5-Medium, counted on the meta device

The authors' program encodes the prompt of every image, asks old, current and reference at each time whatever
their weights (selecting adapters as PEFT does), and averages gradients over processes in each backward pass.
Ours encodes distinct prompts, does not ask the reference where its weight is 0 nor the old policy where it
equals the current one, and averages once per optimizer step. Both run in turn on the images, noises, times
and weights of the same epoch of configs/nft/shapes.yaml; their losses must be equal.
"""

from __future__ import annotations

import argparse
import copy
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from thalweg.apps import build
from thalweg.apps.trainer_cli import find_config, quiet_known_warnings
from thalweg.diffusion.nft.advantage import group_advantage
from thalweg.diffusion.nft.collect import Artist, Samples, chunks, collect
from thalweg.diffusion.nft.data import EpochPlan
from thalweg.diffusion.nft.embeddings import PromptCache, sd3_encoder
from thalweg.diffusion.nft.lora import LoraSpec
from thalweg.diffusion.nft.module import NFTModule
from thalweg.diffusion.nft.policy import Condition, LoraPolicy, Velocities, ask
from thalweg.diffusion.nft.published import ENCODERS, architecture
from thalweg.diffusion.nft.training import Loss, Terms, forward_losses

SD35 = "stabilityai/stable-diffusion-3.5-medium"
SETTINGS = {
    "old equals current, reference of weight 0": (True, 0.0),
    "old has moved, reference of weight 0": (False, 0.0),
    "old has moved, reference of weight 1e-4": (False, 1e-4),
}
TOKENS = 128
"""Of the larger encoder."""
MOVED = 0.3
"""What the old policy keeps of itself."""


class ThreeForwards:
    """Velocities as the authors' program asks for them."""

    def __init__(self, policy: LoraPolicy) -> None:
        self.network: Any = policy.network

    def velocities(self, x_t: Tensor, timestep: Tensor, condition: Condition, **_: Any) -> Velocities:
        """Of all three policies, each time."""
        given = (self.network, x_t, timestep, condition)
        self.network.set_adapter("old")
        with torch.no_grad():
            v_old = ask(*given)
        self.network.set_adapter("current")
        v = ask(*given)
        self.network.disable_adapters()
        with torch.no_grad():
            v_ref = ask(*given)
        self.network.enable_adapters()
        self.network.set_adapter("current")
        return Velocities(v, v_old, v_ref)


class Compared(NFTModule):
    """The module of online fine-tuning, whose training half can have either structure."""

    theirs = False
    repeats = 5

    def losses(self, terms: Terms, positions: Sequence[int], artist: Artist) -> Iterator[Loss]:
        """Losses, which are noted."""
        found = super().losses(terms, positions, artist)
        if self.theirs:
            terms = replace(terms, policy=ThreeForwards(self.policy))  # type: ignore[arg-type]
            found = forward_losses(terms, positions, self.objective, artist.sampler().levels, self.times)
        for loss, metrics in found:
            self.told.append(loss.detach())
            yield loss, metrics

    def _synchronised(self, last: bool) -> Any:
        return nullcontext() if self.theirs else super()._synchronised(last)

    def training_step(self, batch: EpochPlan, batch_idx: int) -> None:
        """Draw once, and train in turn."""
        self.larger = larger_encoder(self.scene.network)
        self.scene.encode(batch["prompts"], self.device)
        artist = Artist(scene=self.scene, policy=self.policy, rollout=self.rollout, seed=self.seed)
        size = self.rollout.batch_size or self.shape_of_epoch.batch
        samples, drawn = None, []
        for _ in range(self.repeats):
            begun = time.perf_counter()
            samples = collect(artist, self.pool, batch, batch_size=size, device=self.device)
            drawn.append(time.perf_counter() - begun)
        assert samples is not None
        rewards, _, groups = self._share(samples, self.shape_of_epoch.images)
        advantage = group_advantage(rewards, groups)[torch.tensor(batch["numbers"])]
        given = (samples, advantage, self.shape_of_epoch, artist)
        self.found = {"rollout": statistics.median(drawn), "settings": {}}
        for name, (equal, kl_weight) in SETTINGS.items():
            self.objective = replace(self.objective, kl_weight=kl_weight)
            if self.policy.old_is_current() and not equal:
                self.told: list[Tensor] = []
                self._train(*given)
                self.policy.follow("old", MOVED)
            self.found["settings"][name] = self._in_turn(given)

    def _in_turn(self, given: tuple[Samples, Tensor, Any, Artist]) -> dict[str, Any]:
        optimizer: Any = self.optimizers().optimizer  # type: ignore[union-attr]
        weights, moments = self.policy.state_dict(), copy.deepcopy(optimizer.state_dict())
        rows: dict[bool, list[tuple[float, ...]]] = {False: [], True: []}
        losses: dict[bool, Tensor] = {}
        for repeat in range(self.repeats + 1):
            for theirs in (False, True) if repeat % 2 else (True, False):
                self.policy.load_state_dict(weights)
                optimizer.load_state_dict(copy.deepcopy(moments))
                self.theirs, self.told = theirs, []
                small, large = self._encode(given[0].plan["prompts"], given[2].batch)
                begun, cpu = time.perf_counter(), time.process_time()
                self._train(*given)
                seconds = (time.perf_counter() - begun, time.process_time() - cpu)
                losses[theirs] = torch.stack(self.told)
                if repeat:  # the first one warms up
                    rows[theirs].append((*seconds, small, large))
        self.policy.load_state_dict(weights)
        optimizer.load_state_dict(moments)
        theirs, ours = ([statistics.median(c) for c in zip(*rows[key], strict=True)] for key in (True, False))
        return {"theirs": theirs, "ours": ours, "losses": losses}

    def _encode(self, prompts: list[str], batch: int) -> tuple[float, float]:
        """Seconds of the model's own encoders, and of a larger one."""
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            kept, begun = self.scene.cache, time.perf_counter()
            if self.theirs:
                encode = sd3_encoder(self.scene.pipe, self.scene.length, self.device)
                for part in chunks(len(prompts), batch):
                    encode(prompts[part])
            else:
                self.scene.cache = PromptCache(folder, kept.identity)
                self.scene.encode(prompts, self.device)
                self.scene.condition(prompts, self.device)
                self.scene.cache = kept
            small, begun = time.perf_counter() - begun, time.perf_counter()
            count = len(prompts) if self.theirs else len(set(prompts))
            for part in torch.zeros(count, TOKENS, dtype=torch.long).split(batch):
                self.larger(part)
            return small, time.perf_counter() - begun


def flops(network: Any, *given: Any, **named: Any) -> tuple[int, Any]:
    """Operations of a call, and its answer."""
    counter = FlopCounterMode(display=False)
    with counter:
        answer = network(*given, **named)
    return counter.get_total_flops(), answer


def of_transformer(network: Any, latents: tuple[int, ...], condition: Condition) -> int:
    """Operations of an evaluation for one image."""
    device = next(network.parameters()).device
    x, told = torch.empty(1, *latents, device=device), torch.ones(1, device=device)
    with torch.no_grad():
        return flops(network, x, timestep=told, return_dict=False, **condition)[0]


def of_published() -> tuple[int, int, int]:
    """Operations of SD3.5-Medium at 512 x 512: an evaluation, one with a backward pass, encoding a prompt."""
    found = architecture(SD35)
    network: Any = found.parts["transformer"].build()
    latents, condition = found.latents(512, 512), found.condition(1, TOKENS, torch.float32)
    forward = of_transformer(network, latents, condition)
    with torch.device("meta"):
        policy = LoraPolicy(network, LoraSpec(r=32, alpha=64))
    x, told = torch.empty(1, *latents, device="meta"), torch.ones(1, device="meta")

    def both() -> None:
        policy.velocity("current", x, told, condition).sum().backward()

    encoding = 0
    for name in ENCODERS:
        tokens = torch.zeros(1, TOKENS if name == "text_encoder_3" else 77, dtype=torch.long, device="meta")
        with torch.no_grad():
            encoding += flops(found.parts[name].build(), tokens)[0]
    return forward, flops(both)[0], encoding


def larger_encoder(transformer: Any) -> Any:
    """A T5 of random weights whose cost, beside this transformer, is in proportion that of SD3.5-Medium's."""
    from transformers import T5Config, T5EncoderModel

    forward, _, encoding = of_published()
    config = transformer.config
    latents = (config.in_channels, config.sample_size, config.sample_size)
    condition = {
        "encoder_hidden_states": torch.zeros(1, 12, config.joint_attention_dim),
        "pooled_projections": torch.zeros(1, config.pooled_projection_dim),
    }
    goal = of_transformer(transformer, latents, condition) * encoding / forward
    sizes = {"vocab_size": 32, "d_model": 64, "d_kv": 16, "num_heads": 4}
    make = lambda wide: T5EncoderModel(T5Config(**sizes, d_ff=wide, num_layers=1)).eval()  # noqa: E731
    with torch.no_grad():
        costs = {wide: flops(make(wide), torch.zeros(1, TOKENS, dtype=torch.long))[0] for wide in (64, 1024)}
    slope = (costs[1024] - costs[64]) / (1024 - 64)
    return make(max(8, round(64 + (goal - costs[64]) / slope)))


def report(found: dict[str, Any], devices: int) -> None:
    """Print the table."""
    print(f"milliseconds per epoch and process, {devices} of them; theirs, ours, ratio")
    drawn = 1e3 * found["rollout"]
    for name, part in found["settings"].items():
        theirs, ours = ([1e3 * value for value in part[key]] for key in ("theirs", "ours"))
        before, after = part["losses"][True], part["losses"][False]
        difference = ((before - after).abs() / before.abs()).max().item()
        assert difference < 1e-5, f"losses differ by {difference:.1e}"
        print(f"{name}; largest relative difference of {len(before)} losses {difference:.1e}")
        train, cpu, small, large = ([side[i] for side in (theirs, ours)] for i in range(4))
        rows = {
            "training": (train,),
            "training, processor time": (cpu,),
            "with encoding": (train, small),
            "with an encoder of SD3.5's proportion as well": (train, small, large),
            f"whole epoch, {drawn:.0f} of its rollouts included": (train, small, (drawn, drawn)),
        }
        for label, parts in rows.items():
            a, b = (sum(part[i] for part in parts) for i in (0, 1))
            print(f"    {label:<48}{a:>8.0f} {b:>8.0f} {b / a:>7.3f}")


def published() -> None:
    """Print operations of an epoch of nft/sd35_geneval.yaml for each image."""
    forward, both, encoding = of_published()
    units = f"an evaluation {forward / 1e12:.2f}, with its backward pass {both / 1e12:.2f}"
    print(f"{SD35}, 10^12 operations per image: {units}, encoding {encoding / 1e12:.2f}")
    steps, times, copies = 10, 9, 24
    theirs = times * (2 * forward + both)
    for name, others in (("old equals current", 0), ("old has moved", 1), ("and reference", 2)):
        ours = times * (others * forward + both)
        whole = (ours + steps * forward + encoding / copies) / (theirs + steps * forward + encoding)
        print(f"    {name:<24} training {ours / theirs:.3f}, whole epoch {whole:.3f} of theirs")


def main() -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--devices", type=int, default=1, help="processes")
    parser.add_argument("--repeats", type=int, default=5, help="of each structure and setting")
    parser.add_argument("--published", action="store_true", help="count operations of SD3.5-Medium only")
    options = parser.parse_args()
    if options.published:
        return published()
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    config: dict[str, Any] = yaml.safe_load(find_config("nft/shapes.yaml").read_text())
    L.seed_everything(config["seed_everything"], verbose=False)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        quiet_known_warnings()
        module: Any = build.build_module(config)
        module.__class__, module.repeats = Compared, options.repeats
        trainer = L.Trainer(
            accelerator="cpu",
            devices=options.devices,
            strategy="ddp" if options.devices > 1 else "auto",
            max_epochs=1,
            limit_val_batches=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            default_root_dir=Path(folder),
        )
        trainer.fit(module, datamodule=build.build_datamodule(config))
    if trainer.is_global_zero:
        report(module.found, options.devices)


if __name__ == "__main__":
    main()
