"""A run on shards goes on from its folder, on as many ranks as there are then."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import RankDiedError, RankFailedError, failures, on_ranks
from sharded_matrices import ShardedMatrix, matrix, uneven
from test_sharded_layout import fsdp, fsdp_of_tensor_parallel, hsdp

from torchlinop import CountingOperator, MatrixOperator, lanczos, run_folder, slq
from torchlinop.distributed import ShardedLayout
from torchlinop.errors import OptionError
from torchlinop.operators.base import CurvatureOperator

K, NCV, TOL = 3, 8, 1e-12
pytestmark = pytest.mark.filterwarnings("ignore:.*reached tol")


def run(op: CurvatureOperator, path=None, **options):
    options = {"ncv": NCV, "tol": TOL} | options
    return lanczos(op, K, checkpoint=path, **options)


def on_shards(path, killed_in=0, saved_each_step=False, **options) -> dict:
    """What the run finds, and the products that it took."""
    if saved_each_step:  # whatever the time it takes
        run_folder._WORTH = 0.0
    op = ShardedMatrix(matrix(), uneven())
    multiply = op._matmat

    def matmat(V):
        if op.products == killed_in - 1 and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return multiply(V)

    op._matmat = matmat
    result = run(op, path, **options)
    return {
        "values": result.eigenvalues,
        "vectors": op.space.gather(result.eigenvectors),
        "matvecs": result.matvecs,
        "restarts": result.restarts,
        "products": op.products,
    }


def assert_is_the_run_without_a_stop(found, expected):
    torch.testing.assert_close(found["values"], expected.eigenvalues, rtol=1e-12, atol=0)
    overlaps = (found["vectors"].T @ expected.eigenvectors).diagonal().abs()
    torch.testing.assert_close(overlaps, torch.ones_like(overlaps), rtol=1e-12, atol=0)
    assert found["matvecs"] == expected.matvecs
    assert found["restarts"] == expected.restarts


@pytest.fixture(scope="module")
def expected():
    result = run(MatrixOperator(matrix()))
    assert result.restarts >= 2
    return result


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A folder of two ranks, of a run that was stopped after its second restart."""
    path = tmp_path_factory.mktemp("stopped") / "run"
    on_ranks(2, on_shards, path, max_iter=19)
    return path


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_it_is_resumed_on_any_number_of_ranks(world_size, stopped, expected, tmp_path):
    path = shutil.copytree(stopped, tmp_path / "run")
    for found in on_ranks(world_size, on_shards, path):
        assert_is_the_run_without_a_stop(found, expected)
        # One more product sees whether the matrix is the same.
        assert found["products"] == expected.matvecs - 19 + 1


def test_it_is_resumed_by_one_process_without_a_process_group(stopped, expected, tmp_path):
    path = shutil.copytree(stopped, tmp_path / "run")
    for products in (expected.matvecs - 19 + 1, 1):  # the second one finds that the run is over
        op = CountingOperator(MatrixOperator(matrix()))
        found = run(op, path)
        assert_is_the_run_without_a_stop(
            {
                "values": found.eigenvalues,
                "vectors": found.eigenvectors,
                "matvecs": found.matvecs,
                "restarts": found.restarts,
            },
            expected,
        )
        assert op.matvecs == products


@pytest.mark.parametrize("killed_in", [6, 17])  # before the first restart, and after
def test_after_a_rank_was_killed_nothing_but_the_last_step_is_taken_again(
    killed_in, expected, tmp_path
):
    with pytest.raises((RankFailedError, RankDiedError)):
        on_ranks(2, on_shards, tmp_path / "run", killed_in, saved_each_step=True, timeout=20)
    for world_size in (1, 2):
        path = shutil.copytree(tmp_path / "run", tmp_path / f"run on {world_size}")
        for found in on_ranks(world_size, on_shards, path):
            assert_is_the_run_without_a_stop(found, expected)
            before = killed_in - 1  # products that were complete
            assert found["products"] == expected.matvecs - before + 1


def on_model(sharding, path, **options):
    layout = ShardedLayout.of(sharding(dist.get_world_size()))
    op = ShardedMatrix(matrix(layout.size), layout.space())
    found = run(op, path, **options)
    return found.eigenvalues, op.space.gather(found.eigenvectors), op.products, layout.size


@pytest.mark.parametrize(
    ("before", "world_size", "after"),
    [(fsdp, 2, fsdp_of_tensor_parallel), (fsdp_of_tensor_parallel, 4, hsdp)],
)
def test_it_is_resumed_on_another_sharding_of_the_model(before, world_size, after, tmp_path):
    _, _, first, n = on_ranks(world_size, on_model, before, tmp_path / "run", max_iter=19)[0]
    expected = run(MatrixOperator(matrix(n)))
    assert first == 19 < expected.matvecs
    for values, vectors, products, _ in on_ranks(4, on_model, after, tmp_path / "run"):
        torch.testing.assert_close(values, expected.eigenvalues, rtol=1e-12, atol=0)
        overlaps = (vectors.T @ expected.eigenvectors).diagonal().abs()
        torch.testing.assert_close(overlaps, torch.ones_like(overlaps), rtol=1e-12, atol=0)
        assert products == expected.matvecs - first + 1


def coarse(path, **options):
    return on_shards(path, basis_dtype=torch.bfloat16, tol=0.05, **options)


def test_a_basis_of_fewer_digits_goes_on_too(tmp_path):
    (whole, *_) = on_ranks(2, coarse, None)
    on_ranks(2, coarse, tmp_path / "run", max_iter=K + 14)
    for found in on_ranks(4, coarse, tmp_path / "run"):
        torch.testing.assert_close(found["values"], whole["values"], rtol=1e-10, atol=0)
        assert found["matvecs"] == whole["matvecs"]


def quadrature(path, **options):
    op = ShardedMatrix(matrix(), uneven())
    return slq(op, 4, 9, probes_at_once=2, checkpoint=path, **options).nodes, op.products


class _ImpatientMatrix(ShardedMatrix):
    """Interrupted in a product, on all ranks."""

    def _matmat(self, V):
        if self.products >= 2 * 9 + 2 * 5:
            raise KeyboardInterrupt
        return super()._matmat(V)

    def __repr__(self):
        return super().__repr__().replace("_Impatient", "Sharded")


def interrupted_quadrature(path):
    slq(_ImpatientMatrix(matrix(), uneven()), 4, 9, probes_at_once=2, checkpoint=path)


@pytest.mark.filterwarnings("ignore:interrupted")
def test_a_quadrature_goes_on_on_other_ranks(tmp_path):
    on_ranks(2, interrupted_quadrature, tmp_path / "run")
    whole = slq(MatrixOperator(matrix()), 4, 9, probes_at_once=2)
    for nodes, products in on_ranks(4, quadrature, tmp_path / "run"):
        torch.testing.assert_close(nodes, whole.nodes, rtol=1e-10, atol=0, equal_nan=True)
        assert products == 2 * 4


def other_problems(path):
    space = uneven()
    with pytest.raises(OptionError, match=r"is of k=3, expected k=2; pass another path"):
        lanczos(ShardedMatrix(matrix(), space), 2, ncv=NCV, tol=TOL, checkpoint=path)
    with pytest.raises(OptionError, match=r"is of n=60, expected n=50"):
        run(ShardedMatrix(matrix(50), uneven(50)), path)
    with pytest.raises(OptionError, match=r"dtype=torch.float64, .*expected dtype=torch.float32"):
        run(ShardedMatrix(matrix(), uneven(dtype=torch.float32)), path, tol=1e-4)
    with pytest.raises(OptionError, match="the matrix is not that of the checkpoint"):
        run(ShardedMatrix(2 * matrix(), space), path)
    latest = path / "latest.json"
    written = latest.read_text()
    dist.barrier()
    if dist.get_rank() == 0:
        changed = json.loads(written)
        latest.write_text(json.dumps(changed | {"format": 2}))
    dist.barrier()
    with pytest.raises(OptionError, match="written by a newer version, in format 2, and this one"):
        run(ShardedMatrix(matrix(), space), path)
    dist.barrier()
    if dist.get_rank() == 0:
        latest.write_text(json.dumps(changed | {"pieces": changed["pieces"][1:]}))
    dist.barrier()
    with pytest.raises(OptionError, match=r"damaged .*pieces are not those of 60 entries"):
        run(ShardedMatrix(matrix(), space), path)
    dist.barrier()
    if dist.get_rank() == 0:
        latest.write_text(written[:40])
    dist.barrier()
    with pytest.raises(OptionError, match=r"latest.json is damaged \(JSONDecodeError: .*another"):
        run(ShardedMatrix(matrix(), space), path)


def wrong_paths(path):
    op = ShardedMatrix(matrix(), uneven())
    if dist.get_rank() == 0:
        (path / "file").write_text("")
        (path / "folder").mkdir()
        (path / "folder" / "thesis.tex").write_text("")
        (path / "full").mkdir()
        (path / "full" / "000001").write_text("")
    dist.barrier()
    for name in ("file", "folder", "missing/run"):
        with pytest.raises(OptionError, match="expected checkpoint to be a folder of such a run"):
            run(op, path / name)
    with pytest.raises(OptionError, match=r"cannot write .*; pass a path with room"):
        run(op, path / "full")


def seen_by_one_rank(path):
    other = path if dist.get_rank() == 0 else path.with_name("elsewhere")
    run(ShardedMatrix(matrix(), uneven()), other)


def test_checkpoints_of_other_problems_are_refused(stopped, tmp_path):
    on_ranks(2, other_problems, shutil.copytree(stopped, tmp_path / "run"))


def test_paths_that_are_no_folder_of_a_run_are_refused(stopped, tmp_path):
    on_ranks(2, wrong_paths, tmp_path)
    for kind, message in failures(2, seen_by_one_rank, stopped):
        assert kind == "OptionError"
        assert "some ranks see a checkpoint" in message


def unreadable(path, method):
    """A file system that fails on rank 1."""
    if dist.get_rank() == 1:
        setattr(Path, method, fail)
    run(ShardedMatrix(matrix(), uneven()), path)


def fail(self, *args, **options):
    raise PermissionError(f"no right to see {self.name}")


@pytest.mark.parametrize(
    ("method", "sentence"),
    [
        ("read_text", "{path}/latest.json is damaged (PermissionError: no right to see latest"),
        ("exists", "cannot look into {path} (PermissionError: no right to see run); pass another"),
        ("iterdir", "cannot look into {path} (PermissionError: no right to see run); pass another"),
    ],
)
def test_a_folder_that_one_rank_cannot_read_ends_all_with_one_sentence(
    method, sentence, stopped, tmp_path
):
    path = shutil.copytree(stopped, tmp_path / "run")
    here, there = failures(2, unreadable, path, method, timeout=20)
    assert here == there
    assert here[0] == "OptionError"
    assert here[1].startswith(sentence.format(path=path))
