"""Orthogonalisation of matrices by the quintic Newton-Schulz iteration of Muon.

Shapes: B batch, M rows, N columns, written for M <= N.  A step on X with ‖X‖_F <= 1 is

    A = X Xᵀ,   X <- a X + (b A + c A²) X,   that is   s <- a s + b s³ + c s⁵   for each singular value s.

Five steps with Jordan's coefficients take s in [0.005, 1] to [0.68, 1.13] and nothing above 1.2024.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from thalweg.core_optim.linalg.batching import batches
from thalweg.core_optim.linalg.symmetric import multiply_add, symmetric_product

Coefficients = tuple[float, float, float]
QUINTIC: Coefficients = (3.4445, -4.7750, 2.0315)
"""Coefficients of Muon (Jordan et al. 2024)."""
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}
"""Number types of the iteration, by the name of the option."""

PAYS_FROM = 128
"""Shorter side from which bf16 is faster than fp32; smaller matrices cost launches, not multiplications."""
WIDE = 1.5
"""Columns per row from which the steps on the Gram matrix pay."""
GROWTH = 45.0
"""Largest product of the coefficients a over which the Gram matrix may be carried along.

Rounding leaves eigenvalues of about -1e-4 in place of 0 in a Gram matrix in bf16, and each step multiplies
them by a². Three of Muon's steps (3.4445³ = 40.9) change the result no more than the plain iteration does.
"""


@lru_cache
def _cpu_has_bf16() -> bool:
    found = torch.cpu.get_capabilities()
    return any(found.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def iteration_dtype(choice: str, x: Tensor) -> torch.dtype:
    """Number type for the iteration on a matrix.

    Args:
        choice: ``auto`` or a key of ``DTYPES``. ``auto`` is bf16 for fp32 matrices with 128 or more on the
            shorter side where the device multiplies bf16 faster (CUDA; CPUs with AVX512-BF16 or AMX), else
            the type of the matrix.
        x: Matrix or batch of matrices.

    Raises:
        ValueError: For an unknown choice.
    """
    if choice in DTYPES:
        return DTYPES[choice]
    if choice != "auto":
        raise ValueError(f"ns_dtype is {choice!r}, allowed: auto, {', '.join(DTYPES)}")
    fast = x.device.type == "cuda" or (x.device.type == "cpu" and _cpu_has_bf16())
    if fast and x.dtype == torch.float32 and min(x.shape[-2:]) >= PAYS_FROM:
        return torch.bfloat16
    return x.dtype


def newton_schulz(
    x: Tensor,
    steps: int = 5,
    *,
    eps: float = 1e-7,
    dtype: torch.dtype | None = None,
    coefficients: Sequence[Coefficients] = (QUINTIC,),
    gram: bool | None = None,
) -> Tensor:
    """Nearly orthogonal matrices with the singular vectors of the given ones.

    Args:
        x: Matrices (M, N) or (B, M, N), of any scale; zero matrices stay zero.
        steps: Number of iterations.
        eps: Smallest Frobenius norm to divide by.
        dtype: Number type of the iteration; that of ``x`` by default. The norm is taken in that of ``x``.
        coefficients: (a, b, c) of each step, the last ones repeated.
        gram: Whether to take the first steps on the Gram matrix; by default for wide matrices of 128 rows or
            more.

    Returns:
        Tensor in the shape and dtype of ``x``.
    """
    if x.ndim == 3 and x.device.type == "cpu" and min(x.shape[-2:]) >= PAYS_FROM:
        # a CPU gains nothing from a batch of large matrices, and single ones can use their symmetry
        ones = [
            newton_schulz(one, steps, eps=eps, dtype=dtype, coefficients=coefficients, gram=gram) for one in x
        ]
        return torch.stack(ones)
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp_min(eps)
    y = torch.div(x, norm, out=torch.empty_like(x, dtype=dtype or x.dtype))
    schedule = [coefficients[min(k, len(coefficients) - 1)] for k in range(steps)]
    short, long = sorted(x.shape[-2:])
    if gram is None:
        gram = short >= PAYS_FROM and long >= WIDE * short
    first = _gram_steps(schedule) if gram else 0
    if first:
        y = _steps_on_gram(y, schedule[:first])
    g = s = spare = None  # memory of earlier steps is used again, which saves clearing new pages
    for a, b, c in schedule[first:]:
        g = _gram(y, g)
        s = symmetric_product(g, g, g, alpha=c, beta=b, out=s)
        y, spare = _apply(s, y, a, spare), y
    return y.to(x.dtype)


def _gram(x: Tensor, out: Tensor | None = None) -> Tensor:
    """X Xᵀ, or Xᵀ X of tall matrices, which need not be turned for it."""
    x = x.mT if x.shape[-2] > x.shape[-1] else x
    return symmetric_product(x, x.mT, out=out)


def _apply(s: Tensor, x: Tensor, a: float, out: Tensor | None = None) -> Tensor:
    """(a I + S) X, or X (a I + S) of tall matrices."""
    if x.shape[-2] > x.shape[-1]:
        return multiply_add(x, s, x, beta=a, out=out)
    return multiply_add(s, x, x, beta=a, out=out)


def _gram_steps(schedule: Sequence[Coefficients]) -> int:
    """How many steps the Gram matrix may be carried along; a single one gains nothing."""
    growth = 1.0
    for k, (a, _, _) in enumerate(schedule):
        growth *= a
        if growth > GROWTH:
            return k if k > 1 else 0
    return len(schedule) if len(schedule) > 1 else 0


def _steps_on_gram(x: Tensor, schedule: Sequence[Coefficients]) -> Tensor:
    """Several steps at once: polynomials in G = X Xᵀ are multiplied as small matrices, then applied to X.

    With B = a I + S, S = b G + c G²:  G <- B G B  and  (q I + R) <- B (q I + R), all symmetric and commuting.
    The multiple of the identity is kept apart, so that bf16 rounds only R.
    """
    g = _gram(x)
    q, r = 1.0, None
    s = h = None
    for k, (a, b, c) in enumerate(schedule):
        s = symmetric_product(g, g, g, alpha=c, beta=b, out=s)
        if k + 1 < len(schedule):
            h = symmetric_product(s, g, g, beta=a, out=h)
            symmetric_product(s, h, h, beta=a, out=g)
        r = s.clone() if r is None else symmetric_product(s, r, torch.add(r, s, alpha=q / a), beta=a)
        q *= a
    assert r is not None
    return _apply(r, x, q)


def polar_factor(x: Tensor) -> Tensor:
    """U Vᵀ of X = U S Vᵀ: the exact result that the iteration approximates; singular values of 0 stay 0."""
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    limit = torch.finfo(x.dtype).eps * max(x.shape[-2:]) * s[..., :1]
    return (u * (s > limit).to(x.dtype)[..., None, :]) @ vh


def muon_scale(rows: int, columns: int, convention: str) -> float:
    """Factor on an orthogonal update of a matrix, by the names of the option ``adjust_lr``.

    ``original`` sqrt(max(1, rows / columns)) (Jordan), ``match_rms_adamw`` 0.2 sqrt(max(rows, columns))
    (Moonlight; learning rates and decay of AdamW carry over), ``spectral`` sqrt(rows / columns) (Dion),
    ``none`` 1.

    Raises:
        ValueError: For another name.
    """
    match convention:
        case "original":
            return math.sqrt(max(1.0, rows / columns))
        case "match_rms_adamw":
            return 0.2 * math.sqrt(max(rows, columns))
        case "spectral":
            return math.sqrt(rows / columns)
        case "none":
            return 1.0
    raise ValueError(f"adjust_lr is {convention!r}, allowed: original, match_rms_adamw, spectral, none")


def orthogonalise(matrices: Sequence[Tensor], choice: str, **options: Any) -> list[Tensor]:
    """Newton-Schulz on many matrices (M, N), those of one oriented shape in batches.

    Args:
        matrices: Of any shapes, on one device and in one dtype.
        choice: Number type of the iteration, see `iteration_dtype`.
        options: Passed on to `newton_schulz`.
    """
    flat = [x.mT if x.shape[0] > x.shape[1] else x for x in matrices]
    found: list[Tensor] = list(matrices)
    for numbers in batches(flat, [x.shape for x in flat]):
        one = flat[numbers[0]]
        dtype = iteration_dtype(choice, one)
        if len(numbers) == 1:
            found[numbers[0]] = newton_schulz(matrices[numbers[0]], dtype=dtype, **options)
            continue
        results = newton_schulz(torch.stack([flat[n] for n in numbers]), dtype=dtype, **options)
        for number, result in zip(numbers, results):
            tall = matrices[number].shape[0] > matrices[number].shape[1]
            found[number] = result.mT if tall else result
    return found
