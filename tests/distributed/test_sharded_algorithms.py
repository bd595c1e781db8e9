"""Algorithms on shards give what they give on one process, with the same seed."""

import numpy as np
import pytest
import torch
from processes import on_ranks
from scipy.sparse.linalg import eigsh
from sharded_matrices import ShardedMatrix, matrix, positive, uneven
from torch import Tensor

import torchlinop as tl
from torchlinop import MatrixOperator
from torchlinop.algorithms.tridiagonal import lanczos_tridiagonal


def eigenpairs(**options):
    """Values and, whatever their signs, vectors."""

    def found(op, solver=tl.lanczos) -> list[Tensor]:
        pairs = solver(op, 2, **options)
        X = op.space.gather(pairs.eigenvectors)
        signs = X.gather(0, X.abs().argmax(0, keepdim=True)).sign()
        return [pairs.eigenvalues, X * signs, torch.tensor(pairs.matvecs)]

    return found


def by(solver, **options):
    return lambda op: eigenpairs(**options)(op, solver)


def density(op):
    found = tl.spectral_density(op, 12, 3, seed=2)
    return [found.quadrature.nodes, found.quadrature.weights]


def traces(method):
    def found(op):
        estimate = tl.trace(op, 20, method=method, seed=3)
        return [estimate.samples, torch.tensor([estimate.estimate, estimate.stderr])]

    return found


def diagonals(num_matvecs, method):
    def found(op):
        estimate = tl.diagonal(op, num_matvecs, method=method)
        return [op.space.gather(estimate.estimate), op.space.gather(estimate.stderr)]

    return found


def norms(op):
    asked = [(2, 8), ("fro", 20), ("fro", 99), ("nuc", 20), ("nuc", 99)]
    found = [tl.norm(op, ord, num_matvecs=m) for ord, m in asked]
    return [torch.tensor([x.estimate, x.lower, x.upper]) for x in found]


def rows(op, columns=2):
    return op.space.random(columns, 8)


def solutions(method):
    def found(op):
        result = tl.solve(op, rows(op), 3.0, method=method, max_iter=6)
        return [op.space.gather(result.x), result.iterations]

    return found


def preconditioned(op):
    M = tl.nystrom(op, 5).inverse(0.5)
    return [op.space.gather(tl.solve(op, rows(op), 0.5, M, method="cg", max_iter=6).x)]


def functions(keep_basis):
    def found(op):
        result = tl.apply_function(op / 50, torch.exp, rows(op), steps=12, keep_basis=keep_basis)
        return [op.space.gather(result.x)]

    return found


def tridiagonals(mode):
    def found(op):
        T = lanczos_tridiagonal(op, rows(op, 1)[:, 0], 8, reorthogonalize=mode)
        return [T.alpha, T.beta]

    return found


def spectra(op):
    config = tl.LanczosConfig(k=2, num_probes=3, num_steps=10)
    found = tl.lanczos_algorithm(op, config)
    return [found.eigenvalues, torch.tensor([found.negative_mass, found.min_eigenvalue])]


def bracket(op):
    ends = tl.extremal_eigenvalues(op)
    return [torch.tensor([*ends, ends.smallest_bound, ends.largest_bound])]


def noisy(op):
    pair = tl.stochastic_power_iteration([op, 1.1 * op], steps=40)
    return [torch.tensor([pair.eigenvalue, pair.stderr])]


def checked(op):
    report = op.check()
    assert report.ok
    return [torch.tensor(report.norm)]


def by_scipy(op):
    v0 = np.ones(op.size)
    values = eigsh(tl.as_linear_operator(op), 2, v0=v0, return_eigenvectors=False)
    return [torch.from_numpy(values)]


OF_ANY = {
    "random": lambda op: [op.space.gather(op.space.random(2, 1, "sphere"))],
    "check": checked,
    "dense": lambda op: [op.to_dense()],
    "combination": lambda op: [(2 * op.shift(0.5) - op / 3).to_dense()],
    "lanczos": eigenpairs(),
    "lanczos, ends": eigenpairs(which="BE", verify=True, tol=1e-3),
    "lanczos, blocks": eigenpairs(block_size=3, which="LA", tol=1e-2),
    "lanczos, partial": eigenpairs(reorthogonalize="partial", max_iter=20),
    "lanczos, local": eigenpairs(reorthogonalize="local", max_iter=12),
    "lanczos, none": eigenpairs(reorthogonalize="none", max_iter=12),
    "lanczos, time": eigenpairs(max_seconds=1000.0),
    "lobpcg": by(tl.lobpcg, tol=1e-3),
    "power iteration": by(tl.deflated_power_iteration, max_iter=30),
    "randomized": by(tl.randomized_eigh, oversampling=4),
    "density": density,
    "hutchinson": traces("hutchinson"),
    "hutch++": traces("hutch++"),
    "na-hutch++": traces("na-hutch++"),
    "xtrace": traces("xtrace"),
    "trace, exact": lambda op: [torch.tensor(tl.trace(op, 99).estimate)],
    "xdiag": diagonals(20, "xdiag"),
    "diagonal": diagonals(20, "hutchinson"),
    "diagonal, exact": diagonals(99, "xdiag"),
    "norms": norms,
    "minres": solutions("minres"),
    "function": functions(True),
    "function, two passes": functions(False),
    "tridiagonal": tridiagonals("full"),
    "three terms": tridiagonals("none"),
    "bracket": bracket,
    "spectrum": spectra,
    "stochastic": noisy,
    "SciPy": by_scipy,
}
OF_POSITIVE = {
    "xnystrace": traces("xnystrace"),
    "cg": solutions("cg"),
    "preconditioned": preconditioned,
    "log det": lambda op: [torch.tensor(tl.logdet(op, num_probes=3, num_steps=8).estimate)],
}


def everything(op, table) -> dict[str, list[Tensor]]:
    return {name: run(op) for name, run in table.items()}


def on_this_rank():
    space = uneven()
    return everything(ShardedMatrix(matrix(), space), OF_ANY) | everything(
        ShardedMatrix(positive(), space), OF_POSITIVE
    )


@pytest.fixture(scope="module")
def expected():
    torch.set_num_threads(1)
    return everything(MatrixOperator(matrix()), OF_ANY) | everything(
        MatrixOperator(positive()), OF_POSITIVE
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_algorithm_gives_what_it_gives_on_one_process(world_size, expected):
    everywhere = on_ranks(world_size, on_this_rank)
    for name, numbers in expected.items():
        for found in everywhere:
            assert len(found[name]) == len(numbers)
            for x, y, first in zip(found[name], numbers, everywhere[0][name], strict=True):
                torch.testing.assert_close(
                    x, y, rtol=1e-10, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}"
                )
                assert torch.equal(x, first), name
