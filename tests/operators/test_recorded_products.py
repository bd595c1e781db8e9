"""CUDA graphs without a GPU: a recorder on the CPU replays the same memory as a device would."""

import gc
import pickle
import threading
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from torchlinop import GGNOperator, HessianOperator, JacobianOperator, cuda_graph
from torchlinop.compiled import WIDTHS, Programs
from torchlinop.cuda_graph import CudaGraphs
from torchlinop.errors import CaptureError, DataError, OptionError
from torchlinop.testing import gallery
from torchlinop.testing.oracles import dense_ggn, dense_hessian, dense_jacobian
from torchlinop.traced import _Tape


class Replayer:
    """Records as a CUDA graph does: the operations, on the very memory they were recorded on.

    Nothing of Python is run in a replay, and the output is one memory, overwritten every time.
    """

    kind = "cpu"

    def __init__(self):
        self.log = []
        self.turns = 0

    def record(self, work):
        for _ in range(cuda_graph.WARM_UP):
            work()
        tape = _Tape(torch.zeros(()))
        with tape:
            output = work()
        graph = tape.finished(output)
        module = nn.Module()
        for i, attribute in enumerate(tape.attributes):
            module.register_buffer(f"attribute_{i}", attribute)
        recorded = torch.fx.GraphModule(module, graph)
        self.log.append("recorded")

        def replay():
            assert self.turns == 1
            self.log.append("replayed")
            output.copy_(recorded(None))

        return replay, output

    @contextmanager
    def turn(self):
        assert self.turns == 0  # nobody else's
        self.turns += 1
        try:
            yield
        finally:
            self.turns -= 1


@pytest.fixture
def recorders(monkeypatch):
    made = []

    def make():
        made.append(Replayer())
        return made[-1]

    monkeypatch.setattr(cuda_graph, "CudaRecorder", make)
    return made


def hessian(p, **options):
    return HessianOperator(p.model, p.batches, p.loss_fn, cuda_graphs=True, **options)


def relative(A, reference):
    return float((A - reference).abs().max() / reference.abs().max())


@pytest.mark.parametrize("options", [{}, {"compile": True}])
@pytest.mark.parametrize("make", [gallery.mlp, gallery.cnn, gallery.gpt2])
def test_replayed_products_are_those_of_the_dense_hessian(recorders, make, options):
    p = make()
    H = hessian(p, column_chunk=3, **options)
    expected = dense_hessian(p.full_loss, p.parameters)
    for seed in range(3):
        V = H.space.random(7, seed=seed)
        assert relative(H @ V, expected @ V) < 1e-12
        assert relative(H @ V[:, 0], expected @ V[:, 0]) < 1e-12
    assert "kept" in repr(H)
    assert "CUDA graphs" in repr(H)


def test_every_batch_and_width_is_recorded_once_and_replayed_from_then_on(recorders):
    p = gallery.mlp()
    H = hessian(p, column_chunk=2)
    for _ in range(5):
        H @ H.space.random(5)  # two chunks of two columns, and one column
    (recorder,) = recorders
    assert recorder.log.count("recorded") == 3 * 2
    # A new program is compared with the eager one on one more block.
    assert recorder.log.count("replayed") == 3 * 3 * 5 + 3 * 2


def test_replayed_gauss_newton_products_and_jacobians_are_the_dense_ones(recorders):
    p = gallery.mlp()
    criterion = nn.CrossEntropyLoss()
    G = GGNOperator(p.model, p.batches, p.forward_fn, criterion, cuda_graphs=True)
    J = JacobianOperator(p.model, p.batches, p.forward_fn, cuda_graphs=True)
    V, U = torch.randn(53, 2).double(), torch.randn(69, 2).double()
    expected = dense_jacobian(p.outputs, p.parameters)
    assert relative(G @ V, dense_ggn(p.loss_of_outputs, p.outputs, p.parameters) @ V) < 1e-12
    assert relative(J @ V, expected @ V) < 1e-12
    assert relative(J.T @ U, expected.T @ U) < 1e-12


def test_callers_never_hold_the_static_output_nor_the_static_input(recorders):
    H = hessian(gallery.mlp(sizes=(23,)))
    V = H.space.random(2)
    first, kept = H @ V, V.clone()
    expected = first.clone()
    second = H @ (3 * V)
    assert torch.equal(first, expected)
    second.fill_(torch.nan)
    V.fill_(torch.nan)
    torch.testing.assert_close(H @ kept, expected, rtol=0, atol=0)


def test_inputs_of_one_width_share_one_static_memory(recorders):
    graphs = CudaGraphs()
    programs = [Programs(lambda V, c=c, last=False: c * V, [graphs]) for c in (2, 3)]
    V = torch.randn(4, 2).double()
    assert torch.equal(torch.stack([A(V) for A in programs]), torch.stack([2 * V, 3 * V]))
    assert len(graphs._inputs) == 1
    del programs
    gc.collect()  # the recorder of this test makes cycles
    assert len(graphs._inputs) == 0


def test_the_graphs_of_the_last_few_widths_are_kept(recorders):
    graphs = CudaGraphs()
    double = Programs(lambda V, last=False: 2 * V, [graphs])
    for k in [*range(1, WIDTHS + 2), 1]:
        V = torch.randn(4, k).double()
        assert torch.equal(double(V), 2 * V)
    (recorder,) = recorders
    assert recorder.log.count("recorded") == WIDTHS + 2
    gc.collect()
    assert len(graphs._inputs) == WIDTHS


def test_training_on_does_not_reach_a_recorded_product(recorders):
    p = gallery.mlp()
    H = hessian(p)
    v = H.space.random(1)[:, 0]
    before = H @ v
    with torch.no_grad():
        for parameter in p.model.parameters():
            parameter.mul_(2)
    assert torch.equal(H @ v, before)


def test_data_written_over_are_refused_before_a_replay(recorders):
    p = gallery.mlp()
    H = hessian(p)
    v = H.space.random(1)[:, 0]
    H @ v
    p.batches[0][0].mul_(2)
    replayed = recorders[0].log.count("replayed")
    with pytest.raises(DataError, match="was written to after its first product"):
        H @ v
    assert recorders[0].log.count("replayed") == replayed
    torch.testing.assert_close(hessian(p) @ v, HessianOperator(p.model, p.batches, p.loss_fn) @ v)


def test_an_operator_is_pickled_without_its_graphs(recorders, monkeypatch):
    H = hessian(gallery.mlp())
    v = H.space.random(1)[:, 0]
    Hv = H @ v
    copied = pickle.loads(pickle.dumps(H))
    assert torch.equal(copied @ v, Hv)
    assert [recorder.log.count("recorded") for recorder in recorders] == [3, 3]


@pytest.mark.parametrize(
    "complaint",
    [
        "CUDA error: operation not permitted when stream is capturing\nCUDA kernel errors might",
        "Cannot copy between CPU and CUDA tensors during CUDA graph capture",
    ],
)
def test_what_cannot_be_captured_is_said_in_one_line(recorders, complaint):
    H = hessian(gallery.mlp())

    def fails(work):
        raise RuntimeError(complaint)

    recorders[0].record = fails
    message = "the product cannot be captured as a CUDA graph .C.*; leave out cuda_graphs"
    with pytest.raises(CaptureError, match=message) as raised:
        H @ H.space.random(1)
    assert "\n" not in str(raised.value)


def test_running_out_of_memory_in_a_capture_is_told_as_such(recorders):
    H = hessian(gallery.mlp())

    def fails(work):
        raise torch.OutOfMemoryError("CUDA out of memory")

    recorders[0].record = fails
    with pytest.raises(torch.OutOfMemoryError):
        H @ H.space.random(1)


def test_a_cpu_operator_has_no_cuda_graphs():
    with pytest.raises(OptionError, match=r"got one on cpu; move the model there, or leave it out"):
        hessian(gallery.mlp())


# The recorder of CUDA itself, its calls in order


class FakeCuda:
    """What ``torch.cuda`` is asked for, in order."""

    def __init__(self, monkeypatch):
        self.log = []
        self.current = [self.stream("torch's")]
        for name, fake in {
            "Stream": lambda: self.stream("capture's"),
            "Event": lambda: "event",
            "current_stream": lambda *_: self.current[-1],
            "stream": self.inside,
            "CUDAGraph": lambda: type("G", (), {"replay": lambda _: self.log.append("replay")})(),
            "graph_pool_handle": lambda: self.log.append("pool") or (0, 1),
            "graph": self.graph,
        }.items():
            monkeypatch.setattr(torch.cuda, name, fake)

    def stream(self, name):
        log = self.log

        class Stream:
            def wait_stream(self, other):
                log.append(f"{name} waits for {other.name}")

            def wait_event(self, event):
                log.append(f"{name} waits for the event")

        Stream.name = name
        return Stream()

    @contextmanager
    def inside(self, stream):
        self.current.append(stream)
        yield
        self.current.pop()

    @contextmanager
    def graph(self, graph, pool, stream, capture_error_mode):
        self.log.append(f"capture on {stream.name} in {pool}, {capture_error_mode}")
        with self.inside(stream):
            yield
        self.log.append("end")


def test_a_capture_is_warmed_up_on_its_own_stream_and_shares_one_pool(monkeypatch):
    cuda = FakeCuda(monkeypatch)
    recorder = cuda_graph.CudaRecorder()
    for _ in range(2):
        replay, output = recorder.record(
            lambda: cuda.log.append(f"work on {cuda.current[-1].name}") or torch.ones(2)
        )
        replay()
    once = [
        "capture's waits for torch's",
        *["work on capture's"] * cuda_graph.WARM_UP,
        "torch's waits for capture's",
        "pool",
        "capture on capture's in (0, 1), thread_local",
        "work on capture's",
        "end",
        "replay",
    ]
    assert cuda.log == once + [call for call in once if call != "pool"]
    assert torch.equal(output, torch.ones(2))


def test_replays_on_several_streams_and_threads_take_turns(monkeypatch):
    log = []

    class Event:
        def record(self, stream):
            log.append(f"{stream.name} done")

    class Stream:
        def __init__(self, name):
            self.name = name

        def wait_event(self, event):
            log.append(f"{self.name} begins")

    own = threading.local()
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: own.stream)
    recorder = cuda_graph.CudaRecorder()

    def replays(name):
        own.stream = Stream(name)
        for _ in range(50):
            with recorder.turn():
                log.append(f"{name} replays")

    threads = [threading.Thread(target=replays, args=(name,)) for name in ("a", "b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(0, len(log), 3):
        name = log[i][0]
        assert log[i : i + 3] == [f"{name} begins", f"{name} replays", f"{name} done"]
    assert len(log) == 300


def test_a_capture_that_fails_leaves_its_stream_and_its_pool(monkeypatch):
    log, pools = [], []

    @contextmanager
    def stream(of):
        log.append("on")
        try:
            yield
        finally:
            log.append("off")

    @contextmanager
    def graph(*arguments, **options):
        yield
        raise RuntimeError("capture was invalidated")

    made = SimpleNamespace(wait_stream=lambda other: None)
    for name, stand_in in {
        "Stream": lambda: made,
        "current_stream": lambda: made,
        "graph_pool_handle": lambda: pools.append(len(pools)) or pools[-1],
        "CUDAGraph": lambda: SimpleNamespace(replay=None),
        "stream": stream,
        "graph": graph,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    recorder = cuda_graph.CudaRecorder()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="capture was invalidated"):
            recorder.record(lambda: log.append("work"))
    assert log == 2 * ["on", *["work"] * cuda_graph.WARM_UP, "off", "on", "work", "off"]
    assert pools == [0, 1]
