"""Vectors, products and solvers over the ranks of a process group."""

from torchlinop.distributed.agreement import agreed
from torchlinop.distributed.data_parallel import data_parallel
from torchlinop.distributed.ddp import (
    DDPEmpiricalFisherOperator,
    DDPGGNOperator,
    DDPHessianOperator,
)
from torchlinop.distributed.drive import drive
from torchlinop.distributed.fully_sharded import (
    FSDPEmpiricalFisherOperator,
    FSDPGGNOperator,
    FSDPHessianOperator,
)
from torchlinop.distributed.sharded_layout import ShardedLayout
from torchlinop.distributed.sharded_space import ShardedSpace
from torchlinop.distributed.split_vectors import over_replicas, split_over

__all__ = [
    "DDPEmpiricalFisherOperator",
    "DDPGGNOperator",
    "DDPHessianOperator",
    "FSDPEmpiricalFisherOperator",
    "FSDPGGNOperator",
    "FSDPHessianOperator",
    "ShardedLayout",
    "ShardedSpace",
    "agreed",
    "data_parallel",
    "drive",
    "over_replicas",
    "split_over",
]
