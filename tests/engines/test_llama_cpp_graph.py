from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from driftscope.engines import llama_cpp_graph as graph
from driftscope.errors import InputError


class MadeTensors:
    """Tensors that ggml itself made, in memory of its own."""

    def __init__(self) -> None:
        self.ggml: Any = graph._library()
        self.context = self.ggml.ggml_init(graph._InitParams(1 << 16, None, False))

    def tensor(self, kind: int, *shape: int) -> int:
        address: int = self.ggml.ggml_new_tensor_3d(self.context, kind, *shape)
        return address

    def read(self, address: int) -> graph.GraphTensor:
        return graph.GraphTensor(address, self.ggml.ggml_op_desc)


@pytest.fixture
def made() -> Any:
    tensors = MadeTensors()
    yield tensors
    tensors.ggml.ggml_free(tensors.context)


def test_a_tensor_is_read_as_ggml_made_it(made: MadeTensors) -> None:
    a, b = made.tensor(0, 3, 5, 7), made.tensor(0, 3, 5, 7)
    made.ggml.ggml_set_name(a, b"a weight")
    values = np.arange(105, dtype=np.float32)
    ctypes.memmove(made.ggml.ggml_get_data(a), values.ctypes.data, values.nbytes)
    total = made.read(made.ggml.ggml_add(made.context, a, b))
    assert total.op == "ADD"
    assert total.operand_names() == ("a weight", "")
    assert total.readable
    assert np.array_equal(total.values(0), values.reshape(1, 7, 5, 3))
    assert np.shares_memory(made.read(a).values(), made.read(a).values())


def test_a_view_with_other_strides_and_another_type_are_refused(made: MadeTensors) -> None:
    made.ggml.ggml_transpose.restype = ctypes.c_void_p
    made.ggml.ggml_transpose.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    turned = made.read(made.ggml.ggml_transpose(made.context, made.tensor(0, 3, 5, 7)))
    half = made.read(made.tensor(1, 3, 5, 7))
    for tensor, found in ((turned, r"strides \[12, 4, 60, 420\]"), (half, "of ggml's type 1")):
        assert not tensor.readable
        with pytest.raises(InputError, match=found):
            tensor.values()


def test_another_layout_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """One field more than ours before the operands, as another version of ggml might have it."""

    class Other(ctypes.Structure):
        _fields_ = (*graph._Tensor._fields_[:7], ("more", ctypes.c_int64), *graph._Tensor._fields_[7:])

    library = graph._library()
    graph._check_layout(library)
    monkeypatch.setattr(graph, "_Tensor", Other)
    with pytest.raises(InputError, match="laid out in a way that driftscope cannot read"):
        graph._check_layout(library)


@pytest.mark.parametrize("fails", ["wants", "take"])
def test_what_is_raised_ends_the_graph_and_is_kept(made: MadeTensors, fails: str) -> None:
    def raising(_: graph.GraphTensor) -> bool:
        raise KeyboardInterrupt

    functions: dict[str, Any] = {"wants": lambda tensor: True, "take": lambda tensor: None, fails: raising}
    api = SimpleNamespace(ggml_backend_sched_eval_callback=lambda function: function)
    watch = graph.Watch(api, **functions)
    address = made.tensor(0, 1, 1, 1)
    # ggml asks, computes, shows, and stops at the first False that it gets back then.
    assert watch.callback(address, True, 0)
    assert not watch.callback(address, False, 0)
    assert watch.callback(address, True, 0)
    assert not watch.callback(address, False, 0)
    with pytest.raises(KeyboardInterrupt):
        watch.check()
    watch.check()
