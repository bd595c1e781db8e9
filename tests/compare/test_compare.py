"""Solvers compared: products counted exactly, the known ordering, what is asked alike of all."""

import importlib.util
import json
import math

import numpy as np
import pytest
import scipy.sparse.linalg
import torch

from torchlinop import (
    CountingOperator,
    HessianOperator,
    LambdaOperator,
    MatrixOperator,
    lanczos,
)
from torchlinop.compare import Request, compare, eigensolver
from torchlinop.testing import RotatedOperator, gallery, problem, spectra
from torchlinop.testing.digits import digits_mlp
from torchlinop.testing.problems import haar

N, K = 200, 10
QUICK = {"seeds": 1, "histories": False, "memory": False}
ORDERING = {  # products to residuals of 1e-6 |λ|, k = 10, of others at n = 4000
    "poly": {"torchlinop lanczos": 27, "scipy eigsh": 28, "scipy lobpcg": 83, "torch lobpcg": 275},
    "slow": {"torchlinop lanczos": 45, "scipy eigsh": 42, "scipy lobpcg": 149},
    "cluster": {"torchlinop lanczos": 57, "scipy eigsh": 58, "scipy lobpcg": 77},
    "nn": {"torchlinop lanczos": 27, "scipy eigsh": 28, "scipy lobpcg": 100},
}
SPECTRA = {
    "poly": spectra.polynomial(N),
    "slow": spectra.polynomial(N, -0.5),
    "cluster": spectra.clustered(N),
    "nn": spectra.neural(N),
}
needs_hessian_eigenthings = pytest.mark.skipif(
    importlib.util.find_spec("hessian_eigenthings") is None, reason="needs hessian-eigenthings"
)


@pytest.mark.parametrize("problem", ORDERING)
def test_products_are_those_published_and_their_ordering(problem):
    published = ORDERING[problem]
    found = compare(RotatedOperator(SPECTRA[problem]), K, solvers=list(published), **QUICK)
    products = {row.solver: row.products.median for row in found.rows}
    assert [row.verdict for row in found.rows] == ["ok"] * len(published)
    for solver in ("torchlinop lanczos", "scipy eigsh"):
        assert products[solver] <= 1.3 * published[solver]
    krylov = max(products["torchlinop lanczos"], products["scipy eigsh"])
    assert krylov < products["scipy lobpcg"] <= 1.3 * published["scipy lobpcg"]
    assert products["scipy lobpcg"] < products.get("torch lobpcg", math.inf)


@needs_hessian_eigenthings
@pytest.mark.parametrize("problem", ["poly", "cluster", "nn"])
def test_ghosts_of_a_hundred_steps_without_reorthogonalization_are_flagged(problem):
    A = RotatedOperator(SPECTRA[problem])
    found = compare(A, K, solvers=["hessian-eigenthings lanczos, 100 steps*"], **QUICK)
    without, with_it = found.rows
    assert without.verdict == "false claim"
    assert without.ghosts > 0
    assert "copies of others" in without.remarks
    assert (with_it.verdict, with_it.ghosts, with_it.missed) == ("ok", 0, 0)


def the_hessian_of_a_network():
    p = digits_mlp()
    return HessianOperator(p.model, p.batches[:1], p.loss_fn)


DIGITS = pytest.mark.parametrize(
    "build", [the_hessian_of_a_network, lambda: problem("digits softmax")], ids=["mlp", "softmax"]
)


@DIGITS
def test_the_ordering_is_the_same_on_digits(build):
    pytest.importorskip("sklearn")
    ordered = ["torchlinop lanczos", "scipy eigsh", "scipy lobpcg", "torch lobpcg"]
    rows = {row.solver: row for row in compare(build, K, solvers=ordered, **QUICK).rows}
    ours, arpack, lobpcg, torchs = (rows[name].products.median for name in ordered)
    assert max(ours, arpack) <= 1.2 * min(ours, arpack)
    assert 2 * max(ours, arpack) < lobpcg < torchs / 2


@needs_hessian_eigenthings
@DIGITS
def test_ghosts_on_digits_are_flagged_unless_the_run_itself_fails(build):
    pytest.importorskip("sklearn")
    found = compare(build, K, solvers=["hessian-eigenthings lanczos, 100 steps*"], **QUICK)
    without, with_it = found.rows
    assert with_it.verdict == "ok"
    if not without.failures:
        assert without.verdict == "false claim"
        assert "copies of others" in without.remarks


def test_all_solvers_installed_answer_without_a_failure():
    found = compare({"nn": RotatedOperator(spectra.neural(120))}, 4, **QUICK)
    assert [row.remarks for row in found.rows if row.failures] == []
    assert {"torchlinop lanczos", "scipy eigsh", "torch lobpcg", "dense eigh"} <= {
        row.solver for row in found.rows
    }
    assert "finds LM, not LA" in found.left_out["torchlinop deflated power"]


@pytest.mark.parametrize("which", ["SA", "LM"])
def test_other_ends_are_compared_too(which):
    A = RotatedOperator(spectra.neural(120))
    wanted = ["torchlinop*", "scipy*", "dense*"]
    rows = [r for r in compare(A, 4, which, wanted, **QUICK).rows if not r.failures]
    assert {"scipy eigsh", "torchlinop lanczos"} <= {r.solver for r in rows if r.verdict == "ok"}
    finds_other_ends = [r.solver for r in rows if r.missed]
    assert finds_other_ends == []


def test_products_and_calls_are_counted_as_by_the_matrix_itself():
    seen = []

    def product(V):
        seen.append(V.shape[1] if V.ndim == 2 else 1)
        return A._matmat(V if V.ndim == 2 else V[:, None]).reshape(V.shape)

    A = RotatedOperator(spectra.neural(80))
    counted = LambdaOperator(80, product, matmat=product, dtype=torch.float64)

    def takes_seven(A, request):
        A @ request.start(A, 4)
        A @ request.start(A, 3)
        seen_by_solver.append(sum(seen[-2:]))
        values, vectors = torch.linalg.eigh(dense)
        return values, vectors

    seen_by_solver, dense = [], A.to_dense()
    row = compare(counted, 3, solvers=[takes_seven], **QUICK).rows[0]
    assert (row.products.median, row.calls.median) == (7, 2)
    assert seen_by_solver == [7]


@pytest.mark.parametrize("solver", ["torchlinop lanczos", "scipy eigsh"])
def test_products_are_those_of_a_call_by_hand(solver):
    A = RotatedOperator(spectra.neural(N))
    v0 = Request(k=K).start(A)[:, 0]
    by_hand = CountingOperator(A)
    if solver == "torchlinop lanczos":
        lanczos(by_hand, K, 100 * K, which="LA", tol=1e-6, v0=v0)
    else:
        product = scipy.sparse.linalg.LinearOperator(
            A.shape, matvec=lambda v: by_hand.matvec(torch.tensor(v)).numpy(), dtype=np.float64
        )
        scipy.sparse.linalg.eigsh(product, K, which="LA", tol=1e-6, v0=v0.numpy())
    assert compare(A, K, solvers=[solver], **QUICK).rows[0].products.median == by_hand.matvecs


def test_all_start_from_the_same_vector_of_a_seed():
    A = RotatedOperator(spectra.neural(50))
    first, again = Request(seed=5).start(A, 3), Request(seed=5).start(A)
    assert torch.equal(first[:, :1], again)
    assert not torch.equal(again, Request(seed=6).start(A))


def test_a_solver_of_five_lines_is_in_the_table():
    @eigensolver("mine, dense")
    def dense(A, request):
        values, vectors = torch.linalg.eigh(A.to_dense())
        return values[-request.k :], vectors[:, -request.k :]

    try:
        found = compare(RotatedOperator(spectra.neural(60)), 3, **QUICK)
    finally:
        eigensolver.remove("mine, dense")
    row = found.row("mine, dense")
    assert (row.verdict, row.products.median) == ("ok", 60)
    assert "mine, dense" in repr(found)


def test_arrays_of_numpy_are_an_answer_and_more_pairs_than_asked_for_are_welcome():
    def numpy_eigh(A, request):
        return np.linalg.eigh(A.to_dense().numpy())

    row = compare(RotatedOperator(spectra.neural(60)), 3, solvers=[numpy_eigh], **QUICK).rows[0]
    assert (row.verdict, row.pairs) == ("ok", 3)


@pytest.mark.parametrize(
    "problem",
    [
        torch.diag(torch.arange(1.0, 31.0, dtype=torch.float64)),
        np.diag(np.arange(1.0, 31.0)),
        scipy.sparse.diags(np.arange(1.0, 31.0)).tocsr(),
        lambda: torch.diag(torch.arange(1.0, 31.0, dtype=torch.float64)),
    ],
    ids=["tensor", "array", "sparse", "function"],
)
def test_a_matrix_may_come_in_any_form(problem):
    found = compare(problem, 3, solvers=["torchlinop lanczos"], truth="dense", **QUICK)
    assert found.rows[0].verdict == "ok"
    assert found.rows[0].error < 1e-9


@pytest.mark.parametrize("build", [False, True])
def test_a_problem_of_testing_comes_with_its_name_and_eigenvalues(build):
    known = problem("clustered", 60, rotation=haar)  # a matrix, which knows no eigenvalues
    asked = (lambda: known) if build else known
    found = compare(asked, 7, solvers=["torchlinop lanczos, block_size=4"], **QUICK)
    assert "all eigenvalues known" in found.facts["clustered"]
    assert (found.row("torchlinop lanczos, block_size=4").missed, found.rows[0].verdict) == (
        0,
        "ok",
    )


def test_true_eigenvalues_may_be_an_array_and_names_numbers(tmp_path):
    A = torch.diag(torch.arange(1.0, 31.0, dtype=torch.float64))
    truth = {1: np.arange(1.0, 31.0), 2: None}
    found = compare({1: A, 2: A}, 3, solvers=["torchlinop lanczos"], truth=truth, **QUICK)
    assert [row.missed for row in found.rows] == [0, None]
    assert "<h2>1</h2>" in found.to_html(tmp_path / "page.html").read_text(encoding="utf-8")


def test_eigenvalues_that_are_not_all_of_an_operator_are_no_truth():
    A = RotatedOperator(spectra.neural(60))
    part = MatrixOperator(A.to_dense())
    part.eigenvalues = A.eigenvalues[:5]  # of a factor, perhaps
    assert compare(part, 3, solvers=["dense*"], **QUICK).rows[0].missed is None


def test_tolerances_relative_to_the_norm_are_as_with_known_eigenvalues():
    values = torch.cat([torch.linspace(-50, 0, 400, dtype=torch.float64), torch.ones(1).double()])
    asked = []

    def asks(A, request):
        asked.append(request.tol_of_norm)

    known = RotatedOperator(values)
    compare(
        {"known": known, "unknown": MatrixOperator(known.to_dense())}, 1, solvers=[asks], **QUICK
    )
    assert asked[1] == pytest.approx(asked[0], rel=0.05)


def test_a_problem_of_the_gallery_is_its_hessian():
    found = compare({"mlp": gallery.mlp()}, 3, solvers=["*lanczos", "dense*"], **QUICK)
    assert "HessianOperator 53x53" in found.facts["mlp"]
    assert {row.verdict for row in found.rows if row.solver.startswith("torchlinop")} == {"ok"}


def test_float32_is_held_to_what_its_products_can_tell():
    A = RotatedOperator(spectra.neural(120).float())
    found = compare(A, 5, solvers=["torchlinop*", "scipy eigsh*"], **QUICK)
    assert "tol 0.0001" in found.facts["asked"]
    assert {row.remarks for row in found.rows if row.verdict == "false claim"} == set()


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_verdicts_do_not_depend_on_the_scale(scale):
    A = RotatedOperator(scale * spectra.neural(120))
    rows = compare(A, 5, solvers=["torchlinop*", "scipy eigsh", "dense*"], **QUICK).rows
    assert {row.solver: row.verdict for row in rows if not row.failures} == {
        row.solver: "ok" for row in rows if not row.failures
    }


def test_histories_end_where_the_run_does_and_cost_more_for_more():
    A = RotatedOperator(spectra.neural(120))
    wanted = ["torchlinop lanczos", "scipy eigsh", "dense eigh"]
    found = compare(A, 5, solvers=wanted, seeds=1, memory=False)
    ours, arpack, dense = found.histories
    assert (ours.by, arpack.by) == ("budget", "tolerance")
    for history in found.histories:
        assert list(history.products) == sorted(set(history.products))
        assert history.products[-1] == found.row(history.solver).products.median
        assert history.values[-1] == pytest.approx(found.row(history.solver).residual, rel=1e-6)
    assert ours.values[-1] < 1e-4 * ours.values[0]
    assert len(dense.products) == 1


def test_memory_is_that_of_the_basis():
    A = RotatedOperator(spectra.neural(3000))
    found = compare(A, 5, solvers=["torchlinop lanczos", "scipy eigsh"], seeds=1, histories=False)
    ours, arpack = found.rows
    assert 11 <= ours.peak_vectors <= 60
    assert 20 <= arpack.peak_vectors <= 40  # ncv = 20, a residual, work space of three


def test_global_random_numbers_are_as_before():
    def draws(A, request):
        torch.randn(3)
        np.random.rand(3)
        raise ArithmeticError

    before = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    compare(RotatedOperator(spectra.neural(40)), 3, solvers=[draws], **QUICK)
    assert torch.equal(before[0], torch.random.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])


def test_seeds_are_those_given_and_spread_is_shown():
    def depends_on_the_seed(A, request):
        A @ request.start(A, 10 + request.seed)
        return torch.linalg.eigh(dense)

    A = RotatedOperator(spectra.neural(60))
    dense = A.to_dense()
    options = {**QUICK, "seeds": [4, 7, 9]}
    row = compare(A, 3, solvers=[depends_on_the_seed], **options).rows[0]
    assert (row.products.least, row.products.median, row.products.most) == (14, 17, 19)
    assert row.columns()[0].cell(row) == "17 (14-19)"


def test_json_holds_all_numbers_and_no_nan(tmp_path):
    A = RotatedOperator(spectra.neural(60))
    found = compare(A, 3, solvers=["torchlinop lanczos", "scipy eigsh"], seeds=2)
    found.save(tmp_path / "found.json")
    read = json.loads((tmp_path / "found.json").read_text(), parse_constant=pytest.fail)
    assert [row["solver"] for row in read["rows"]] == ["torchlinop lanczos", "scipy eigsh"]
    assert read["rows"][0]["residual"] == found.rows[0].residual
    assert read["rows"][1]["claimed_residual"] is None
    assert read["histories"][0]["products"] == list(found.histories[0].products)


def test_a_dataframe_has_a_row_a_solver():
    pytest.importorskip("pandas")
    found = compare(RotatedOperator(spectra.neural(60)), 3, solvers=["torchlinop lanczos"], **QUICK)
    frame = found.to_dataframe()
    assert frame.loc[0, "products"] == found.rows[0].products.median
    assert {"solver", "residual", "ghosts", "seconds_least"} <= set(frame.columns)


def test_a_row_is_found_by_name():
    found = compare(RotatedOperator(spectra.neural(60)), 3, solvers=["dense*"], **QUICK)
    assert found.row("dense eigh").solver == "dense eigh"
    with pytest.raises(KeyError, match="no row of 'nope'; there are dense eigh"):
        found.row("nope")
