"""Long quadratures: what ends them early, and files from which they go on bit by bit."""

import pytest
import torch

from torchlinop import LambdaOperator, MatrixOperator
from torchlinop.algorithms.quadrature import logdet, slq
from torchlinop.algorithms.spectral_density import spectral_density
from torchlinop.errors import MemoryEstimateError, NonFiniteError, NotConvergedWarning, OptionError
from torchlinop.testing.gallery import with_spectrum

pytest.importorskip("safetensors")

N = 100
A = with_spectrum(torch.linspace(-1, 2, N, dtype=torch.float64) ** 3)[0]


def limited(products, dtype=torch.float64, error=KeyboardInterrupt, matrix=A):
    """The matrix, which raises instead of giving one block of products more, and its counts."""
    counts = []

    def matmat(V):
        if len(counts) == products:
            raise error
        counts.append(V.shape[1])
        return matrix.to(dtype) @ V

    return LambdaOperator(N, lambda v: matrix.to(dtype) @ v, matmat=matmat, dtype=dtype), counts


def same(one, other):
    return all(
        torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))
        for a, b in zip(
            (one.nodes, one.weights, one.residuals),
            (other.nodes, other.weights, other.residuals),
            strict=True,
        )
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.complex128])
@pytest.mark.parametrize("products", [1, 7, 20, 21, 30, 59])
def test_a_resumed_quadrature_is_that_without_interruption_bit_by_bit(dtype, products, tmp_path):
    options = {"seed": 3, "probes_at_once": 2}  # three groups of twenty blocks
    whole = slq(limited(60, dtype)[0], 6, 20, **options)
    options["checkpoint"] = tmp_path / "slq.safetensors"
    with pytest.warns(NotConvergedWarning, match="interrupted after "):
        slq(limited(products, dtype)[0], 6, 20, **options)
    op, counts = limited(60, dtype)
    resumed = slq(op, 6, 20, **options)
    assert same(resumed, whole)
    assert len(counts) == 60 - products  # nothing is multiplied twice
    assert (resumed.matvecs, resumed.warnings) == (120, ())


def test_a_quadrature_may_be_interrupted_again_and_again(tmp_path):
    whole = slq(MatrixOperator(A), 4, 16, probes_at_once=2)
    options = {"probes_at_once": 2, "checkpoint": tmp_path / "slq.safetensors"}
    for _ in range(4):
        with pytest.warns(NotConvergedWarning, match="interrupted"):
            slq(limited(7)[0], 4, 16, **options)
    assert same(slq(limited(4)[0], 4, 16, **options), whole)


def test_a_finished_quadrature_is_read_without_any_product(tmp_path):
    path = tmp_path / "slq.safetensors"
    whole = slq(limited(10)[0], 3, 10, checkpoint=path)
    again = slq(limited(0)[0], 3, 10, checkpoint=path)
    assert same(again, whole)
    assert again.matvecs == 30


def test_what_breaks_off_without_notice_has_been_saved_a_few_steps_before(tmp_path):
    path = tmp_path / "slq.safetensors"
    with pytest.raises(ConnectionError):
        slq(limited(18, error=ConnectionError)[0], 3, 20, checkpoint=path)
    op, counts = limited(20)
    assert same(slq(op, 3, 20, checkpoint=path), slq(MatrixOperator(A), 3, 20))
    assert len(counts) == 5  # 15 of 20 were there


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, r"is of seed=0, expected seed=1; pass another path, or delete the file"),
        ({"num_probes": 3}, "is of num_probes=2, probes_at_once=2, expected num_probes=3"),
        ({"num_steps": 9}, "is of num_steps=8, expected num_steps=9"),
        ({"op": MatrixOperator(A)}, "is of operator=<LambdaOperator 100x100 float64 cpu>"),
        ({"op": limited(0, torch.float32)[0]}, "expected operator=<LambdaOperator 100x100 float32"),
    ],
)
def test_a_file_of_another_problem_is_refused_before_any_product(change, message, tmp_path):
    path = tmp_path / "slq.safetensors"
    slq(limited(8)[0], 2, 8, checkpoint=path)
    options = {"op": limited(0)[0], "num_probes": 2, "num_steps": 8} | change
    with pytest.raises(OptionError, match=message):
        slq(**options, checkpoint=path)


@pytest.mark.parametrize("matrix", [A + 1e-9 * A @ A, 3 * A, torch.eye(N).double()])
@pytest.mark.parametrize("products", [1, 3, 7])
def test_another_matrix_than_that_of_the_file_is_refused(matrix, products, tmp_path):
    path = tmp_path / "slq.safetensors"
    with pytest.warns(NotConvergedWarning, match="interrupted"):
        slq(limited(products)[0], 2, 8, checkpoint=path)
    saved = path.read_bytes()
    with pytest.raises(OptionError, match="the matrix is not that of the checkpoint: a product d"):
        slq(limited(99, matrix=matrix)[0], 2, 8, checkpoint=path)
    assert path.read_bytes() == saved


def test_a_density_and_a_log_determinant_resume_too(tmp_path):
    path, shifted = tmp_path / "density.safetensors", A + 2 * torch.eye(N).double()
    with pytest.warns(NotConvergedWarning, match="interrupted after 3 of 8 steps"):
        spectral_density(limited(3)[0], 2, 8, 50, checkpoint=path)
    resumed = spectral_density(limited(5)[0], 2, 8, 50, checkpoint=path)
    assert torch.equal(resumed.density, spectral_density(MatrixOperator(A), 2, 8, 50).density)
    path = tmp_path / "logdet.safetensors"
    options = {"num_probes": 2, "num_steps": 8}
    with pytest.warns(NotConvergedWarning, match="interrupted after 3 of 8 steps"):
        logdet(limited(3, matrix=shifted)[0], **options, checkpoint=path)
    resumed = logdet(limited(5, matrix=shifted)[0], **options, checkpoint=path)
    assert resumed.estimate == logdet(MatrixOperator(shifted), **options).estimate


def test_time_ends_a_quadrature_after_the_step_it_is_in(tmp_path):
    options = {"max_seconds": 1e-9, "checkpoint": tmp_path / "slq.safetensors"}
    with pytest.warns(NotConvergedWarning, match="out of time after 1 of 3 steps of 2 of 2 probes"):
        slq(limited(9)[0], 2, 3, **options)
    with pytest.warns(NotConvergedWarning, match="out of time after 2 of 3 steps"):
        assert slq(limited(9)[0], 2, 3, **options).num_steps == 2
    assert slq(limited(9)[0], 2, 3, **options).warnings == ()


def test_a_sum_of_an_interrupted_quadrature_says_so():
    with pytest.warns(NotConvergedWarning, match="interrupted"):
        interrupted = slq(limited(5)[0], 2, 8)
    warnings = ("interrupted after 5 of 8 steps of 2 of 2 probes",)
    assert interrupted.spectral_sum(torch.exp).warnings == warnings
    assert f"warnings: {warnings[0]}" in repr(interrupted)
    assert f"warnings: {warnings[0]}" in repr(interrupted.spectral_sum(torch.exp))


def test_running_out_of_memory_is_named():
    with pytest.raises(MemoryEstimateError, match=r"ran out in product 9 .* num_probes"):
        slq(limited(4, error=RuntimeError("not enough memory"))[0], 2, 8)


def test_products_that_are_not_finite_are_never_saved(tmp_path):
    path = tmp_path / "slq.safetensors"
    with pytest.raises(NonFiniteError, match="hold NaN or infinity, by product 4"):
        slq(limited(9, matrix=A * float("nan"))[0], 2, 8, checkpoint=path)
    assert not path.exists()


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_shown_on_a_terminal(terminal, capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal)
    slq(limited(8)[0], 2, 8, progress=True)
    assert ("16/16" in capsys.readouterr().err) == terminal
