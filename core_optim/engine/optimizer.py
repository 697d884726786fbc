"""The one optimizer class of the core: parameter groups, each with a rule, and the step.

Every group carries its rule and all of its options, so "Muon for the matrices, AdamW for the rest" is one
optimizer with one state and one learning-rate schedule.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from thalweg.core_optim.engine import sharding
from thalweg.core_optim.engine.buckets import Job, Slot, run_elements, run_matrices
from thalweg.core_optim.engine.groups import COMMON, LABELS, complete_group, fill_missing, plain
from thalweg.core_optim.engine.loading import refuse_foreign, restore_dtypes
from thalweg.core_optim.engine.random import Randomness
from thalweg.core_optim.engine.rule import ElementRule, Rule, StateSpec
from thalweg.core_optim.engine.update import HALF, Plan
from thalweg.core_optim.engine.views import can_view

KERNELS = ("auto", "fused", "foreach", "loop", "compile")


class CoreOptimizer(Optimizer):
    """Optimizer over groups that each name an algorithm.

    Args:
        params: Parameters, named parameters, or groups of them. A group may have ``rule``, the name of an
            algorithm, and any option of that algorithm; a group with another rule than the optimizer's own
            starts from the defaults of that rule.
        rule: Algorithm of groups that name none.
        kernel: How element rules run: ``loop`` over tensors, ``foreach`` on lists of them, ``compile``,
            ``fused`` where torch has such a kernel (AdamW); ``auto`` takes fused, then loop on a CPU and
            foreach elsewhere. Cut parameters always run on lists, which adds up their sums in one call.
        foreach: As in torch: True for ``kernel="foreach"``, False for ``"loop"``.
        compile: Short for ``kernel="compile"``: one compiled graph for all shapes.
        seed: Seed of everything random, which is a function of (seed, step, parameter).
        options: Options of the rule and the common ones: maximize, decay, cautious, state_dtype,
            stochastic_rounding, complex.

    Raises:
        ValueError: For unknown options, values that are not allowed, and parameters a rule cannot handle.
    """

    RULE: ClassVar[str | None] = None

    def __init__(
        self,
        params: Iterable[Any],
        rule: str | None = None,
        *,
        kernel: str = "auto",
        foreach: bool | None = None,
        compile: bool = False,
        seed: int = 0,
        **options: Any,
    ) -> None:
        if kernel not in KERNELS:
            raise ValueError(f"kernel is {kernel!r}, allowed: {', '.join(KERNELS)}")
        if compile and foreach:
            raise ValueError("compile and foreach exclude each other")
        name = rule or self.RULE
        if name is None:
            raise ValueError("no rule is given; name an algorithm, or use one of the classes")
        self.kernel = "compile" if compile else {None: kernel, True: "foreach", False: "loop"}[foreach]
        self.random: Any = Randomness(seed)
        own = complete_group({"params": []}, name, options, type(self).__name__, {})
        self._own = (name, {k: v for k, v in own.items() if k not in ("params", "rule")}, dict(options))
        super().__init__(params, {})
        self.defaults = dict(self._own[1])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its rule and options are checked and completed.

        Raises:
            ValueError: Naming the group and its parameters.
        """
        name, _, given = self._own
        number = len(self.param_groups)
        group = complete_group(param_group, name, given, f"group {number}", self.__dict__.get("defaults", {}))
        defaults, self.defaults = self.defaults, {}
        try:
            super().add_param_group(group)
        finally:
            self.defaults = defaults
        try:
            self._check(number)
        except ValueError:
            del self.param_groups[number]
            raise

    def _check(self, number: int) -> None:
        group = self.param_groups[number]
        rule = _rule(group)
        for i, parameter in enumerate(group["params"]):
            reason = rule.refuse(parameter, group)
            if parameter.is_complex():
                reason = _refuse_complex(rule, group) or reason
            if reason:
                label = repr(group["name"]) + " " if "name" in group else ""
                raise ValueError(
                    f"group {label}{number} ({group['rule']}), parameter {parameter_name(group, i)} of shape"
                    f" {tuple(parameter.shape)}: {reason}"
                )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step over all parameters that have a gradient.

        Args:
            closure: Computes the loss and its gradients; its value is returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._refuse_sparse()
        first = 0
        for group in self.param_groups:
            slots = self._slots(group, first)
            first += len(group["params"])
            if slots:
                self._step_group(group, slots)
        return loss

    def _refuse_sparse(self) -> None:
        """Before anything moves."""
        for group in self.param_groups:
            for i, parameter in enumerate(group["params"]):
                if parameter.grad is not None and parameter.grad.layout != torch.strided:
                    raise ValueError(
                        f"{_rule(group).title} does not take sparse gradients ({parameter_name(group, i)}):"
                        " build the embedding with sparse=False, or give it an optimizer of its own such as"
                        " torch.optim.SparseAdam"
                    )

    def _slots(self, group: dict[str, Any], first: int) -> list[Slot]:
        slots = []
        rule = _rule(group)
        for i, parameter in enumerate(group["params"]):
            gradient = parameter.grad
            if gradient is None:
                continue
            state = self.state[parameter]
            if "step" not in state:
                state |= initial_state(rule, parameter, group)
            state["step"] += 1
            gradient = sharding.aligned(gradient, parameter)
            slots.append(
                Slot(parameter, gradient, state, int(state["step"]), first + i, parameter_name(group, i))
            )
        return slots

    def _step_group(self, group: dict[str, Any], slots: list[Slot]) -> None:
        rule = _rule(group)
        extra = rule.begin(group, slots)
        buckets: dict[Any, list[Slot]] = {}
        for slot in slots:
            p = slot.parameter
            decays = rule.decays(p.shape, group)
            if isinstance(rule, ElementRule):
                case, packed = rule.case(slot, group), hasattr(rule, "fused") and _packed(slot)
                rest: tuple[Any, ...] = (p.dtype, sharding.placement_key(p), slot.t)
            else:
                # these see whole parameters in the dtype of the computation
                case, packed, rest = "", False, (torch.float32 if p.dtype in HALF else p.dtype,)
            buckets.setdefault((case, decays, packed, p.device, *rest), []).append(slot)
        common = {**_numbers(group), **extra}
        for (case, decays, packed, *_), members in buckets.items():
            numbers = {**common, **rule.scalars(members[0].t, group)}
            plan = Plan(
                decay=(group["decay"] or rule.way_of_decay(group)) if decays else None,
                cautious=group["cautious"],
                maximize=group["maximize"],
                stochastic=group["stochastic_rounding"],
            )
            kernel = self._kernel(rule, plan, members[0].parameter, packed)
            job = Job(rule, plan, case, kernel, group, numbers, self.random)
            if kernel == "fused":
                cast(Any, rule).fused(members, numbers)
            elif isinstance(rule, ElementRule):
                run_elements(job, members)
            else:
                run_matrices(job, members)

    def _kernel(self, rule: Rule, plan: Plan, p: Tensor, packed: bool) -> str:
        """The kernel of a bucket with this parameter; what the user asked for wherever it can be had."""
        if packed and self.kernel in ("auto", "fused"):
            special = plan.cautious or plan.stochastic or plan.maximize
            simple = plan.decay in ("decoupled", None) and not special
            if simple and p.device.type in ("cpu", "cuda", "mps", "xpu"):
                return "fused"
        if sharding.is_sharded(p) and not (self.kernel == "compile" and _alone(rule, plan)):
            return "foreach"
        if self.kernel in ("auto", "fused"):
            return "loop" if p.device.type == "cpu" else "foreach"
        return self.kernel

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore state and options; every tensor keeps the dtype in which it was saved.

        Raises:
            ValueError: If a group was saved with another rule, or the groups do not match.
        """
        before = [dict(group) for group in self.param_groups]
        final = state_dict

        def check(_: Optimizer, found: dict[str, Any]) -> None:
            nonlocal final
            final = found
            refuse_foreign(self, found)

        def restore(_: Optimizer) -> None:
            fill_missing(self.param_groups, before)
            restore_dtypes(self, final)

        # after the hooks of others that change what is loaded, and before those that look at the result
        hooks = [
            self.register_load_state_dict_pre_hook(check),
            self.register_load_state_dict_post_hook(restore, prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles hold; hooks stay behind, as in torch."""
        return {**super().__getstate__(), "kernel": self.kernel, "random": self.random, "_own": self._own}

    def train(self) -> None:
        """Put the weights for training in place; only schedule-free rules have others for evaluation."""
        self._exchange("train")

    def eval(self) -> None:
        """Put the weights for evaluation in place; only schedule-free rules have such."""
        self._exchange("eval")

    @torch.no_grad()
    def _exchange(self, mode: str) -> None:
        for group in self.param_groups:
            rule = _rule(group)
            if hasattr(rule, "exchange"):
                rule.exchange(group, [(p, self.state[p]) for p in group["params"] if self.state.get(p)], mode)


def _refuse_complex(rule: Rule, group: dict[str, Any]) -> str | None:
    if not isinstance(rule, ElementRule):
        return f"{rule.title} has no update for complex numbers; use an element rule such as adamw"
    if group["complex"] == "modulus" and not rule.moduli:
        return f"complex is 'modulus', allowed: real; {rule.title} treats real and imaginary parts apart"
    return None


def _packed(slot: Slot) -> bool:
    """Whether torch's fused kernels, which go along the memory, may have a parameter and its moments."""
    p = sharding.local(slot.parameter)
    moments = [sharding.local(v) for name, v in slot.state.items() if name != "step"]
    if not p.is_floating_point() or not can_view(p, "flat") or slot.gradient.dtype != p.dtype:
        return False
    return all(m.dtype == p.dtype and m.stride() == p.stride() for m in moments)


def parameter_name(group: dict[str, Any], i: int) -> str:
    """Name of a parameter of a group, or its number where nobody named it."""
    return group["param_names"][i] if "param_names" in group else f"number {i}"


def initial_state(rule: Rule, parameter: Tensor, options: dict[str, Any]) -> dict[str, Tensor]:
    """State of a parameter before its first step, with a count of steps on the CPU as torch keeps it."""
    state = {"step": torch.tensor(0.0)}
    default = state_dtype(parameter, options["state_dtype"])
    for name, spec in rule.states(parameter.shape, options).items():
        state[name] = _new_state(parameter, spec, default, isinstance(rule, ElementRule))
    return state


def _new_state(parameter: Tensor, spec: StateSpec, default: torch.dtype, elements: bool) -> Tensor:
    dtype = spec.dtype or default
    device = sharding.local(parameter).device
    if spec.shape == "like":
        if elements:
            return sharding.state_like(parameter, dtype, spec.fill)
        return torch.full(parameter.shape, spec.fill, dtype=dtype, device=device)
    real = {torch.complex64: torch.float32, torch.complex128: torch.float64}.get(dtype, dtype)
    if spec.shape == "rows":
        return sharding.rows_like(parameter, real, spec.fill)
    return torch.full(tuple(spec.shape), spec.fill, dtype=real, device=device)


def state_dtype(parameter: Tensor, asked: str | None) -> torch.dtype:
    """fp32 for parameters in half precision unless asked otherwise, else the dtype of the parameter."""
    if asked == "bfloat16" and not parameter.is_complex():
        return torch.bfloat16
    if asked == "parameter" or parameter.dtype not in HALF:
        return parameter.dtype
    return torch.float32


def _rule(group: dict[str, Any]) -> Rule:
    from thalweg.core_optim.registry import rule

    return rule(group["rule"])


def _numbers(group: dict[str, Any]) -> dict[str, float]:
    """Numeric options of a group, betas one by one."""
    found = {
        name: plain(value)
        for name, value in group.items()
        if isinstance(value, float | Tensor) and name not in (*COMMON, *LABELS)
    }
    for i, beta in enumerate(group.get("betas", ()), start=1):
        found[f"beta{i}"] = beta
    for name in ("lr", "weight_decay"):  # users and schedulers may put whole numbers into a group
        if name in group:
            found[name] = plain(group[name])
    found["lr_peak"] = plain(group.get("initial_lr", group["lr"])) or 1.0
    found.setdefault("weight_decay", 0.0)
    return found


def _alone(rule: Rule, plan: Plan) -> bool:
    """Whether a part of a parameter can be updated without the other parts."""
    return isinstance(rule, ElementRule) and not rule.sums and not plan.cautious
