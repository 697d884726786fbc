"""Which parameters of scOT share a learning rate and weight decay, and which are frozen.

The groups are those of the published fine-tuning: embedding and recovery, the lead-time modulation of the
norms, parameters without decay, and the rest.
"""

from __future__ import annotations

import re

from torch import nn

from thalweg.core_optim.config import GroupRule

EMBEDDING_RECOVERY = r"embeddings|patch_recovery"
"""Everything between fields and tokens, the norm and the biases of the embedding included."""
TIME_EMBEDDING = r"norm(?:_before|_after)?\.(?:weight|bias)\.(?:weight|bias)$"
"""The affine maps from lead time to gain and shift."""
NO_DECAY = r"bias|norm(?:_before|_after)?\.(?:weight|bias)(?:\.weight|\.bias)?$"
"""Norms and every name with "bias" in it, which covers the network behind the relative position bias."""


def group_rules(
    lr: float,
    weight_decay: float,
    lr_embedding_recovery: float | None = None,
    lr_time_embedding: float | None = None,
) -> list[GroupRule]:
    """Rules in order of precedence; a group whose learning rate is not given joins the general ones.

    Embedding and recovery decay, biases included, when they have a learning rate of their own; the time
    embedding never decays.

    Args:
        lr: learning rate of the bulk.
        weight_decay: decay of matrices, logit scales and layer scales.
        lr_embedding_recovery: learning rate of patch embedding and recovery.
        lr_time_embedding: learning rate of the lead-time modulation.
    """
    rules = []
    if lr_embedding_recovery is not None:
        rules.append(_rule("embedding_recovery", EMBEDDING_RECOVERY, lr_embedding_recovery, weight_decay))
    if lr_time_embedding is not None:
        rules.append(_rule("time_embedding", TIME_EMBEDDING, lr_time_embedding, 0.0))
    rules.append(_rule("no_weight_decay", NO_DECAY, lr, 0.0))
    rules.append(_rule("standard", ".", lr, weight_decay))
    return rules


def _rule(name: str, pattern: str, lr: float, weight_decay: float) -> GroupRule:
    # Networks without conditioning have no time embedding, and frozen ones lack other groups.
    return GroupRule(name=name, pattern=pattern, lr=lr, weight_decay=weight_decay, optional=True)


def freeze_latent(model: nn.Module) -> list[str]:
    """Freeze everything but embedding, recovery and time embedding; returns the names that still train.

    This is the cheap fine-tuning of the paper's case study (arXiv 2405.19101): the operator learned in
    pretraining stays as it is and only its interface to fields and lead times adapts.

    Raises:
        ValueError: if nothing would be left to train.
    """
    trainable = re.compile(f"{EMBEDDING_RECOVERY}|{TIME_EMBEDDING}")
    names = [name for name, _ in model.named_parameters() if trainable.search(name)]
    if not names:
        raise ValueError(f"{type(model).__name__} has no embedding, recovery or time embedding to train")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trainable.search(name) is not None)
    return names
