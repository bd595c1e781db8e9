"""
Eigenvalues of a model under FSDP2
==================================

The exact Hessian of a model whose parameters are in shards, by the library's own solvers. On every
rank a part of the data; the answer is that of one process with all of them. As a plain script it
runs on one rank; on two: ``torchrun --nproc-per-node 2 examples/14_fsdp2.py``. It is
not executed when this page is made.
"""

import copy

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from torchlinop import lanczos, trace
from torchlinop.distributed import FSDPGGNOperator, FSDPHessianOperator
from torchlinop.testing.oracles import dense_hessian

if dist.is_torchelastic_launched():  # by torchrun
    dist.init_process_group("gloo")
else:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
rank, ranks = dist.get_rank(), dist.get_world_size()


def say(*what):
    if rank == 0:
        print(*what, flush=True)


# %%
# A model under ``fully_shard``, part by part, and the data of this rank: batches of different
# sizes, and not as many on every rank.
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 12), nn.SiLU(), nn.LayerNorm(12), nn.Linear(12, 4)).double()
whole = copy.deepcopy(model)
mesh = init_device_mesh("cpu", (ranks,))
for layer in model:
    if list(layer.parameters()):
        fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)

X, y = torch.randn(50, 8).double(), torch.randint(0, 4, (50,))
edges = torch.linspace(0, 1, ranks + 1).square().mul(50).int().tolist()  # unequal parts
mine = slice(edges[rank], edges[rank + 1])
data = list(zip(X[mine].split(20), y[mine].split(20), strict=True))


def loss_fn(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


# %%
# Every rank builds the operator. Its products are exact: forward mode over the model's own backward
# pass, compared with finite differences of one batch when it is built.
H = FSDPHessianOperator(model, data, loss_fn)
say(H)

# %%
# The algorithms run on shards as they do on whole vectors. Every rank has the same numbers, and its
# own rows of the eigenvectors, which ``gather`` brings together.
pairs = lanczos(H, 2, tol=1e-4)
largest = pairs.eigenvalues
vectors = H.sharded_layout.gather(pairs.eigenvectors)
say(f"\nlargest eigenvalues {largest.tolist()}")
say(f"this rank holds {H.space.local_size} of {H.size} entries of a vector")

G = FSDPGGNOperator(model, data, lambda model, batch: model(batch[0]), nn.CrossEntropyLoss())
estimate = trace(G, 32)
say(f"trace of the Gauss-Newton matrix {estimate.estimate:.4f}")

# %%
# For comparison, the dense answer, from all data on one process.
parameters = [*whole.parameters()]
dense = dense_hessian(lambda: loss_fn(whole, (X, y)), parameters)
expected = torch.linalg.eigvalsh(dense).flip(0)[:2]
residual = (dense @ vectors - vectors * largest.to(dense)).norm(dim=0).max()
say("\nfor comparison: the dense answer")
say(f"largest eigenvalues {expected.tolist()}")
say(f"largest residual of the eigenvectors, gathered, with the dense matrix: {residual:.1e}")
assert torch.allclose(largest.to(expected), expected, rtol=1e-6)
dist.destroy_process_group()
