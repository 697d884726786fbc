"""Training of any app without gradients: MeZO and ZO2 under Lightning.

Lightning's automatic optimisation calls ``backward`` in the closure that it hands to an optimizer. The
callback here turns it off where a run's optimizer is MeZO or ZO2, and lets that optimizer evaluate the
module's own ``training_step``. Modules need no change. In a run with any other optimizer the callback does
nothing.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.hooks import RemovableHandle

from thalweg.apps.alterations import Alterations
from thalweg.core_optim.mezo import MeZO
from thalweg.core_optim.zo2 import ZO2, find_blocks

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
IS_QUIET = ContextVar("IS_QUIET", default=False)
"""Whether the evaluation that runs is one that is not logged; evaluations of ZO2 have a context each."""
AFTER_STEP = r".*Using ModelCheckpoint with manual optimization and every_n_train_steps.*"
"""Lightning's warning that a checkpoint written after a step holds the weights after that step."""


class ZerothOrder(L.Callback):
    """Run a module's ``training_step`` twice per step and direction, if its optimizer is MeZO or ZO2.

    All evaluations of a step see the same batch and the same state of torch's global generators. What they
    log comes from the first one, at the weights shifted forwards; ``train/projected_gradient`` is added.
    Learning-rate schedules step as under automatic optimisation.

    ZO2 streams the blocks that ``find_blocks`` finds in ``module.network``, or in the whole module if it has
    none, in training and in validation. The pending update is applied before validation, before every state
    dict of the module (hence before checkpoints), and at the end of the fit. On a GPU Lightning moves the
    whole module there before blocks can be parked in host memory, so it has to fit once without activations.

    Args:
        host_dtype: What the host keeps of streamed blocks: float32, bfloat16 or float16; the parameters' own
            type if not given. Used by ZO2 only.
        backend: What moves blocks; chosen by device if not given. Used by ZO2 only.
    """

    def __init__(self, host_dtype: str | None = None, backend: Any = None) -> None:
        if host_dtype is not None and host_dtype not in DTYPES:
            raise ValueError(f"host_dtype is {host_dtype!r}, allowed: {', '.join(DTYPES)}")
        self.host_dtype = host_dtype
        self.backend = backend
        self.optimizer: MeZO | None = None
        self.changes = Alterations()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Undo what an earlier fit of the same module has left."""
        self.changes.undo()

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take over the steps of a module with a zeroth-order optimizer; its state is not yet restored.

        Raises:
            ValueError: If the combination cannot be right.
        """
        self.optimizer = None
        found = [optimizer for optimizer in trainer.optimizers if isinstance(optimizer, MeZO)]
        if not found or self is not in_charge(trainer):
            return
        self.optimizer = found[0]
        check(trainer, pl_module, self.optimizer)
        warnings.filterwarnings("ignore", message=AFTER_STEP)
        pl_module.automatic_optimization = False
        self.changes.later(lambda: setattr(pl_module, "automatic_optimization", True))
        self.changes.replace(pl_module, "training_step", self._training_step(trainer, pl_module))
        self.changes.replace(pl_module, "log", quiet_log(pl_module))
        if isinstance(self.optimizer, ZO2):
            self._stream(pl_module, self.optimizer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Step the schedules that count epochs."""
        if self.optimizer is not None:
            step_schedules(trainer, pl_module, "epoch", trainer.current_epoch + 1)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Give streamed weights back to the module."""
        if isinstance(self.optimizer, ZO2) and self.optimizer.streamed is not None:
            self.optimizer.detach()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Give streamed weights back after a fit that failed."""
        self.on_train_end(trainer, pl_module)

    def _training_step(self, trainer: L.Trainer, module: L.LightningModule) -> Callable[..., Tensor]:
        inner = module.training_step

        @functools.wraps(inner)
        def training_step(*args: Any, **kwargs: Any) -> Tensor:
            calls = 0

            def closure() -> Tensor:
                nonlocal calls
                calls += 1
                before = IS_QUIET.set(calls > 1)
                try:
                    return loss_of(inner(*args, **kwargs))
                finally:
                    IS_QUIET.reset(before)

            wrapped = module.optimizers()
            assert not isinstance(wrapped, list)
            assert self.optimizer is not None
            loss: Tensor = wrapped.step(closure=closure)
            module.log("train/projected_gradient", self.optimizer.projected_gradient)
            step_schedules(trainer, module, "step", trainer.global_step)
            return loss

        return training_step

    def _stream(self, module: L.LightningModule, optimizer: ZO2) -> None:
        network = getattr(module, "network", module)
        optimizer.attach(
            module,
            find_blocks(network),
            resident=shared_parts(network),
            host_dtype=None if self.host_dtype is None else DTYPES[self.host_dtype],
            backend=self.backend,
        )
        inner = module.validation_step

        @functools.wraps(inner)
        def validation_step(*args: Any, **kwargs: Any) -> Any:
            return optimizer.run(lambda: inner(*args, **kwargs))

        self.changes.replace(module, "validation_step", validation_step)

        def flush(*_: Any) -> None:
            if optimizer.streamed is not None:
                optimizer.flush()

        handle: RemovableHandle = module.register_state_dict_pre_hook(flush)
        self.changes.later(handle.remove)


def in_charge(trainer: L.Trainer) -> ZerothOrder:
    """The callback that acts: every run of the command line has one, and one with options takes its place."""
    found = [callback for callback in trainer.callbacks if isinstance(callback, ZerothOrder)]
    given = [one for one in found if one.host_dtype is not None or one.backend is not None]
    return (given or found)[0]


def check(trainer: L.Trainer, module: L.LightningModule, optimizer: MeZO) -> None:
    """Refuse what cannot be right with a zeroth-order optimizer.

    Raises:
        ValueError: With the reason.
    """
    name = type(optimizer).__name__
    precision = str(trainer.precision)
    if len(trainer.optimizers) > 1 or not module.automatic_optimization:
        raise ValueError(f"{type(module).__name__} runs its optimizers itself, which {name} cannot replace")
    if trainer.accumulate_grad_batches != 1:
        raise ValueError(
            f"accumulate_grad_batches is {trainer.accumulate_grad_batches}, allowed with {name}: 1, since"
            " there are no gradients to add up; enlarge the batch, or give optimizer.step a list of closures"
        )
    if trainer.gradient_clip_val:
        raise ValueError(
            f"gradient_clip_val is {trainer.gradient_clip_val}, allowed with {name}: null, since there are no"
            " gradients; lower the learning rate"
        )
    if precision == "16-mixed":
        raise ValueError(
            f"precision is 16-mixed, allowed with {name}: 32-true, bf16-mixed or bf16-true; the loss scaler"
            " of 16-mixed calls the optimizer without its closure, and there is no gradient to scale"
        )
    if any(isinstance(c.scheduler, ReduceLROnPlateau) for c in trainer.lr_scheduler_configs):
        raise ValueError(f"ReduceLROnPlateau is not supported with {name}: use a schedule of the step")
    if isinstance(optimizer, ZO2):
        if trainer.world_size > 1:
            raise ValueError(
                f"the run has {trainer.world_size} processes, allowed with ZO2: 1, since Lightning's wrapper"
                " holds on to weights that ZO2 moves; use mezo"
            )
        if any(isinstance(callback, WeightAveraging) for callback in trainer.callbacks):
            raise ValueError("weight averages would lag behind by the pending update of ZO2: use mezo")


def shared_parts(network: torch.nn.Module) -> list[torch.nn.Module]:
    """Parts of a network's blocks that are used outside of them as well."""
    if any(type(part).__module__.startswith("diffusers.") for part in network.modules()):
        from thalweg.diffusion import streaming

        return streaming.shared_parts(network)
    return []


def step_schedules(trainer: L.Trainer, module: L.LightningModule, interval: str, done: int) -> None:
    """Step the schedules of an interval; Lightning leaves them to us under manual optimisation."""
    for config in trainer.lr_scheduler_configs:
        if config.interval == interval and done % config.frequency == 0:
            module.lr_scheduler_step(config.scheduler, None)


def loss_of(output: Any) -> Tensor:
    """The loss in what a training step returns.

    Raises:
        ValueError: If it returns none.
    """
    loss = output["loss"] if isinstance(output, Mapping) else output
    if loss is None:
        raise ValueError("training_step returned no loss, which steps without gradients need")
    found: Tensor = loss
    return found


def quiet_log(module: L.LightningModule) -> Callable[..., None]:
    """The module's ``log``, silent wherever ``IS_QUIET`` is set."""
    inner = module.log

    @functools.wraps(inner)
    def log(*args: Any, **kwargs: Any) -> None:
        if not IS_QUIET.get():
            inner(*args, **kwargs)

    return log
