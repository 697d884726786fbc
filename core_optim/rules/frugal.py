"""FRUGAL: AdamW on a changing part of the gradient, sign descent without state on the rest."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from thalweg.core_optim.engine.options import FLAG, Option, adam_options_placeholder
