"""
How much do diagonal blocks leave out?
======================================

A block-diagonal method believes that parameters of different blocks do not interact. How wrong that
is, block by block, from a few products: by parameter, and by module.
"""

import torch

from torchlinop import BlockDiagonalOperator, HessianOperator, block_coupling
from torchlinop.demo import digits_mlp
from torchlinop.testing.oracles import dense_hessian

problem = digits_mlp()  # a trained MLP, a list of batches, and loss_fn(model, batch)
H = HessianOperator(problem.model, problem.batches, problem.loss_fn)
print(H, "\n")

# The rows (H v)_b of a product against H_bb v_b, for random v: what H does, and what a
# block-diagonal approximation believes that it does.
print(block_coupling(H, by="parameter", num_probes=64), "\n")

# %%
# Larger blocks leave out less: here weight and bias of a layer together.
print(block_coupling(H, by="module", num_probes=64), "\n")

# %%
# The blocks are operators, and so is the block diagonal part.
blocks = H.blocks(by="parameter")
D = BlockDiagonalOperator.of(H, by="parameter")
V = H.space.random(3)
DV = D @ V
print(f"{blocks['2.weight']}\n{D}\n")

# %%
# For comparison, the dense answer.
dense = dense_hessian(problem.full_loss, problem.parameters, rows_at_once=64)
print("for comparison: the dense answer")
for name, block in blocks.items():
    rows = dense[block.indices]
    cosine = rows[:, block.indices].norm() / rows.norm()
    print(f"  {name:8}   {(1 - cosine**2).sqrt():6.3f}           {cosine:6.3f}")
exact = torch.block_diag(*[dense[b.indices][:, b.indices] for b in blocks.values()]) @ V
difference = (DV - exact).abs().max() / exact.abs().max()
print(f"block diagonal part times three vectors: largest relative difference {difference:.1e}")

# %%
# The picture, with ``pip install "torchlinop[plot]"``:
# how much of the square of the Hessian's entries every block holds.
import matplotlib.pyplot as plt

share = torch.tensor(
    [
        [float(dense[a.indices][:, b.indices].square().sum()) for b in blocks.values()]
        for a in blocks.values()
    ]
)
share /= share.sum()
figure, ax = plt.subplots(figsize=(5, 4), layout="constrained")
image = ax.imshow(share.log10(), vmin=-4, vmax=0)
ax.set_xticks(range(len(blocks)), blocks, rotation=30)
ax.set_yticks(range(len(blocks)), blocks)
for i, row in enumerate(share.tolist()):
    for j, part in enumerate(row):
        ax.text(j, i, f"{part:.1%}", ha="center", va="center", color="k" if part > 0.03 else "w")
figure.colorbar(image, label="log10 of the share")
plt.show()
