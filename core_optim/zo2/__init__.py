"""ZO2: MeZO on networks whose blocks stay in host memory and pass through the device one after another.

Wang et al. 2025, "ZO2: Scalable Zeroth-Order Fine-Tuning for Extremely Large Language Models with Limited GPU
Memory" (arXiv 2503.12668); written from the paper's scheme.
"""

from thalweg.core_optim.zo2.backends import Backend, CudaBackend, HostBackend, SlotBackend, TraceBackend
from thalweg.core_optim.zo2.contract import Chain, ChainLoss
from thalweg.core_optim.zo2.find import find_blocks
from thalweg.core_optim.zo2.optimizer import ZO2
from thalweg.core_optim.zo2.stream import BlockStream

__all__ = [
    "ZO2",
    "Backend",
    "BlockStream",
    "Chain",
    "ChainLoss",
    "CudaBackend",
    "HostBackend",
    "SlotBackend",
    "TraceBackend",
    "find_blocks",
]
