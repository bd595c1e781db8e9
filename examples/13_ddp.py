"""
A Hessian over the data of several processes
============================================

Every process has the model and some of the data; the matrix is that of one process with all of
them. ``torchrun --nproc-per-node 2 examples/13_ddp.py`` runs it on two, and as a plain script it is
one. It is not executed when this page is made.
"""

import os

import torch
import torch.distributed as dist
from scipy.sparse.linalg import eigsh
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Subset, TensorDataset

from torchlinop import HessianOperator, as_linear_operator, lanczos, spectral_density
from torchlinop.demo import digits_mlp
from torchlinop.distributed import DDPHessianOperator, drive

torch.set_num_threads(1)
if "RANK" in os.environ:  # started by torchrun
    dist.init_process_group("gloo")
else:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
rank, world_size = dist.get_rank(), dist.get_world_size()


def say(text):
    if rank == 0:
        print(text)


p = digits_mlp()  # a trained MLP on 1,797 digits: the same on every rank
images, labels = p.full_batch
model = DistributedDataParallel(p.model)

# The first rank has a sixth of the data, the others share the rest: nothing has to be equal.
edges = [0, len(labels) // (6 if world_size > 1 else 1)]
while len(edges) <= world_size:
    edges.append(edges[-1] + (len(labels) - edges[1]) // (world_size - 1))
edges[-1] = len(labels)
mine = Subset(TensorDataset(images, labels), range(edges[rank], edges[rank + 1]))
H = DDPHessianOperator(model, DataLoader(mine, batch_size=256), p.loss_fn)
say(repr(H))

# %%
# Every rank takes the same steps, on the same numbers; a product is one all-reduce.
result = lanczos(H, k=3, tol=1e-10)
say(f"lanczos on every rank:  {result.eigenvalues.tolist()}")
density = spectral_density(H, num_runs=2, lanczos_steps=20)
say(f"spectral density: {len(density.grid)} points from {float(density.grid[0]):.3f}")

# %%
# A solver of another library runs on rank 0; the others serve its products.
values, _ = drive(H, lambda A: eigsh(as_linear_operator(A), k=3, which="LA", tol=1e-12))
say(f"eigsh on rank 0:        {values[::-1].tolist()}")

# %%
# For comparison: one process with all data.
alone = HessianOperator(p.model, [p.full_batch], p.loss_fn)
v = torch.ones(alone.size, dtype=alone.dtype)
expected = alone @ v
error = (H @ v - expected).norm() / expected.norm()
say(f"difference from one process with all data: {error:.1e}")
assert error < 1e-13
dist.destroy_process_group()
