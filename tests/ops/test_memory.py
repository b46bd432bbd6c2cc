"""memory_read: every implementation against the reference, in outputs and in every gradient; on GPUs see elsewhere."""

from __future__ import annotations

import itertools

import pytest
import torch
from tests.ops import memory_cases as cases
from tests.ops.memory_cases import FORMS, NAMES, SHAPES, assert_all_close, lowest_indices, make_inputs, read, run
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from sparsepeft.ops import explain, memory_read, registry
from sparsepeft.ops.memory import choice
from sparsepeft.ops.memory.pytorch_selected import TILE_SLOTS, plan_tiles
from sparsepeft.ops.numerics import top_k_lowest_index

FAST = ("dense", "selected")
ALL = ("reference", *FAST)
HALF = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize("shape", SHAPES)
def test_matches_reference(shape: str) -> None:
    cases.check_matches(shape, impls=FORMS, dtype=torch.float64)


@pytest.mark.parametrize("impl", FAST)
def test_half_precision_is_as_close_to_float32_as_the_reference(impl: str) -> None:
    for dtype in HALF:
        cases.check_half("all parents", dtype, impl=impl)
        cases.check_half_selects_among_the_best(dtype, impl=impl)


@pytest.mark.parametrize("impl", [*ALL, "cpu"])
def test_float32_memory_keeps_its_precision_on_half_precision_input(impl: str) -> None:
    for dtype in HALF:
        cases.check_float32_memory_on_half_input(dtype, impl=impl)


@pytest.mark.parametrize("impl", [*ALL, "cpu"])
def test_zero_values_leave_the_input_exactly(impl: str) -> None:
    dtypes = [torch.float32, *HALF] if impl == "cpu" else [torch.float64, torch.float32, *HALF]
    for shape, dtype in itertools.product(("paper-like", "many parents"), dtypes):
        for memory_dtype in (torch.float32,) if impl == "cpu" else (torch.float32, None):
            cases.check_zero_values(dtype, impl=impl, shape=shape, memory_dtype=memory_dtype)


@pytest.mark.parametrize("impl", [*ALL, "cpu"])
def test_layouts_autocast_and_gradients_only_where_required(impl: str) -> None:
    cases.check_layouts(impl=impl)
    cases.check_only_needed_gradients(impl=impl, dtype=torch.float32 if impl == "cpu" else torch.float64)


@pytest.mark.parametrize("impl", ALL)
def test_gradcheck(impl: str) -> None:
    lead, hidden, parents, children, top_k = (2, 3), 5, 4, 3, 2
    x = torch.randn(*lead, hidden, dtype=torch.float64)
    parent_keys = torch.randn(parents, hidden, dtype=torch.float64)
    scores = (x @ parent_keys.T).sort(-1, descending=True).values
    assert (scores[..., top_k - 1] - scores[..., top_k]).min() > 1e-3  # away from ties: no selection flips
    memory = [torch.randn(parents, children, hidden, dtype=torch.float64) for _ in range(2)]
    leaves = [tensor.requires_grad_() for tensor in (x, parent_keys, *memory)]
    assert torch.autograd.gradcheck(lambda *t: read(*t, top_k=top_k, temperature=0.7, impl=impl), leaves)


@pytest.mark.parametrize("num_columns", [16, 33, 100])
def test_top_k_lowest_index(num_columns: int) -> None:
    scores = torch.randint(-3, 4, (80, num_columns)).double()
    scores[::4] = torch.randn(20, num_columns).double()  # rows without ties between them
    scores[1] = 2.0
    torch.compiler.reset()
    compiled = torch.compile(top_k_lowest_index, fullgraph=True, backend="eager")  # settles ties without looking
    for top_k, function in ((1, top_k_lowest_index), (5, compiled), (5, top_k_lowest_index), (15, top_k_lowest_index)):
        values, indices = function(scores, top_k)
        assert indices.sort(-1).values.tolist() == lowest_indices(scores, top_k)
        assert torch.equal(values, scores.gather(-1, indices))


@pytest.mark.parametrize("impl", [*ALL, "cpu"])
def test_ties_keep_the_lowest_parent(impl: str) -> None:
    for num_parents in (16, 60):
        cases.check_ties(num_parents, impl=impl)


@pytest.mark.parametrize("impl", [*FAST, "cpu"])
def test_nan_in_nan_out(impl: str) -> None:
    for shape in ("paper-like", "many parents"):
        cases.check_nan(impl=impl, shape=shape)


# Tracing


@pytest.mark.parametrize("shape", ["paper-like", "many parents"])  # "auto" is dense for the first, else selected
def test_compiles_to_one_graph(shape: str) -> None:
    torch.compiler.reset()  # each case compiles anew; recompilations of one function are limited
    inputs, top_k = make_inputs(shape), SHAPES[shape][-1]

    def step(*tensors: Tensor) -> Tensor:
        return memory_read(*tensors, top_k=top_k)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    expected = run(inputs, torch.ones_like(inputs[0]), top_k=top_k, impl="reference")
    actual = run(inputs, torch.ones_like(inputs[0]), function=compiled)
    assert_all_close(actual, expected, rtol=1e-11, atol=1e-12)
    with torch.no_grad():
        shorter = inputs[0][:, :2]
        torch.testing.assert_close(compiled(shorter, *inputs[1:]), step(shorter, *inputs[1:]))


@pytest.mark.slow  # the inductor backend calls a C++ compiler
def test_inductor_matches_reference() -> None:
    torch.compiler.reset()
    inputs, top_k = make_inputs("many parents", torch.float32), 5
    grad_output = torch.randn_like(inputs[0])
    expected = run(inputs, grad_output, top_k=top_k, impl="reference")
    compiled = torch.compile(lambda *t: memory_read(*t, top_k=top_k), fullgraph=True)
    assert_all_close(run(inputs, grad_output, function=compiled), expected, rtol=1e-5, atol=2e-6)


class Reader(torch.nn.Module):
    def __init__(self, memory: list[Tensor], top_k: int) -> None:
        super().__init__()
        self.memory, self.top_k = torch.nn.ParameterList(memory), top_k

    def forward(self, x: Tensor) -> Tensor:
        return memory_read(x, *self.memory, top_k=self.top_k)


@pytest.mark.parametrize("form", ["dense", "gathered"])
def test_exports_with_any_number_of_tokens(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = {"dense": "paper-like", "gathered": "many parents"}[form]
    (x, *memory), top_k = make_inputs(shape, torch.float32), SHAPES[shape][-1]
    reader = Reader(memory, top_k).eval()
    tokens = torch.export.Dim("tokens", min=2, max=512)
    if form == "gathered":
        monkeypatch.setattr(choice, "_GATHERED_CHILD_WORK", 1)  # else it takes hundreds of parents
    exported = torch.export.export(reader, (x,), dynamic_shapes={"x": {1: tokens}})
    operators = {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}
    assert not any("sparsepeft" in name for name in operators)  # other runtimes must understand the graph
    for length in (2, 31):
        x = torch.randn(x.shape[0], length, x.shape[2])
        torch.testing.assert_close(exported.module()(x), reader(x), rtol=1e-5, atol=2e-6)


def test_export_settles_ties_as_eager_does(monkeypatch: pytest.MonkeyPatch) -> None:
    memory, x = [torch.zeros(40, 4), torch.zeros(40, 1, 4), torch.randn(40, 1, 4)], torch.randn(3, 4)
    for work in (100, 0):  # dense, gathered
        monkeypatch.setattr(choice, "_GATHERED_CHILD_WORK", work)
        exported = torch.export.export(Reader(memory, 3), (x,)).module()
        torch.testing.assert_close(exported(x), x + memory[2][:3, 0].mean(0))


def test_selected_operator_is_registered_soundly() -> None:
    for flags in ((True, False), (False, True)):
        inputs = make_inputs("odd")
        inputs[0] = inputs[0].flatten(0, 1).requires_grad_(flags[0])
        for tensor in inputs[1:]:
            tensor.requires_grad_(flags[1])
        torch.library.opcheck(torch.ops.sparsepeft.memory_read_selected.default, (*inputs, 4, 1.5))


# The plan of tiles and the choice


def test_tiles_cover_every_pair_once() -> None:
    many = [TILE_SLOTS * 2 + 3, 0, 1]
    for counts in ([0], [0, 0, 5], [1] * 300, many, [400, 1] * 20, [0, 3, 0, 0, 0, 900, 2, 0], [1, *[0] * 999] * 5):
        for max_scattered in (1, 64):
            covered = [0] * len(counts)
            for tile in plan_tiles(counts, max_scattered):
                is_slice = isinstance(tile.parents, slice)
                parents = range(tile.parents.start, tile.parents.stop) if is_slice else tile.parents
                assert len(parents) * tile.slots <= TILE_SLOTS
                for parent in parents:
                    assert covered[parent] == tile.skip or not counts[parent]
                    covered[parent] += min(tile.slots, counts[parent] - tile.skip)
            assert covered == counts


def test_pytorch_takes_the_form_with_less_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def form(parents: int, children: int, top_k: int) -> str:
        keys, cells = torch.empty(parents, 8), torch.empty(parents, children, 8)
        arguments = choice.MemoryArguments(torch.empty(4, 8, requires_grad=True), keys, cells, cells, top_k)
        return next(name for name, function in FORMS.items() if function is choice._choose_form(arguments))

    assert form(16, 3, 8) == "dense"
    assert form(4096, 32, 8) == "selected"
    assert form(64, 32, 64) == "dense"  # all parents selected: there is nothing to save
    assert form(64, 32, 8) == "selected"
    # An exported graph has to gather, so it stays dense for longer.
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    assert form(64, 32, 8) == "dense"
    assert form(4096, 32, 8) == "gathered"


@pytest.mark.parametrize("fastest", ["cpu", "dense", "selected"])
def test_auto_runs_what_was_measured_to_be_the_fastest(fastest: str, monkeypatch: pytest.MonkeyPatch) -> None:
    times = dict.fromkeys(("dense", "selected", "cpu"), 2.0) | {fastest: 1.0}
    monkeypatch.setattr(choice, "fastest", lambda *_: dict(sorted(times.items(), key=lambda item: item[1])))
    choice._times.cache_clear()
    inputs = make_inputs("many parents", torch.float32)
    explanation = explain(memory_read, *inputs, top_k=5)
    assert explanation.impl == ("cpu" if fastest == "cpu" else "torch")
    if fastest != "cpu":
        assert (
            f"slower on this machine with {torch.get_num_threads()} threads ({fastest} 1 ms, "
            in explanation.others["cpu"]
        )
    assert torch.equal(memory_read(*inputs, top_k=5), read(*inputs, top_k=5, impl=fastest))
    choice._times.cache_clear()
    inputs = [tensor.requires_grad_() for tensor in make_inputs("paper-like", torch.float32)]
    assert explain("memory_read", *inputs, top_k=8).impl == ("cpu" if fastest == "cpu" else "torch")
    choice._times.cache_clear()
    inputs = [tensor.requires_grad_() for tensor in make_inputs("sparse use of many parents", torch.float32)]
    assert "with gradients it multiplies with the whole memory" in explain(memory_read, *inputs, top_k=2).others["cpu"]


def test_an_implementation_can_be_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs("odd", torch.float32)
    monkeypatch.setattr(registry, "DISABLED", frozenset({"cpu"}))
    monkeypatch.setattr(choice, "DISABLED", frozenset({"cpu"}))
    choice._times.cache_clear()
    explanation = explain(memory_read, *inputs, top_k=4)
    choice._times.cache_clear()
    assert explanation.impl == "torch"
    assert "not cpu: SPARSEPEFT_DISABLE turns it off" in str(explanation)
    with pytest.raises(ValueError, match="impl is 'cpu', but SPARSEPEFT_DISABLE turns it off"):
        memory_read(*inputs, top_k=4, impl="cpu")
    monkeypatch.setenv("SPARSEPEFT_DISABLE", "CPU torch")
    with pytest.raises(ValueError, match="SPARSEPEFT_DISABLE names torch; expected some of cpu,triton,flex"):
        registry._read_names("SPARSEPEFT_DISABLE")
    with pytest.raises(ValueError, match=r"operator is 'len'; expected one of .*memory_read"):
        explain(len)
    with pytest.raises(TypeError, match="top_k"):
        explain(memory_read, *inputs, tok_p=4)


# The compiled kernels


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_cpu_kernel_matches_reference(dtype: torch.dtype) -> None:
    for shape, sizes in SHAPES.items():
        inputs = make_inputs(shape, dtype, memory_dtype=torch.float32)
        expected = memory_read(*inputs, top_k=sizes[-1], temperature=1.6, impl="reference")
        actual = memory_read(*inputs, top_k=sizes[-1], temperature=1.6, impl="cpu")
        assert actual.dtype == dtype
        tolerance = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]  # a rounding of the output
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * 2)


def test_cpu_kernel_takes_scores_and_views(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many tokens, whose parents are scored by one matrix product; transposed and strided tensors."""
    x, *memory = make_inputs("paper-like", torch.float32)
    x = torch.randn(24, 2 * 900)[:, ::2].t()
    memory = [tensor.transpose(0, -1).contiguous().transpose(0, -1) for tensor in memory]
    threads_before = torch.get_num_threads()
    for many, top_k in itertools.product((0, 1 << 40), (5, 8)):  # alone and, with half of the parents, a few at once
        monkeypatch.setattr("sparsepeft.ops.memory.cpu._MANY_SCORES", many)
        expected = memory_read(x, *memory, top_k=top_k, impl="reference")
        for threads in (1, 3):
            torch.set_num_threads(threads)
            try:
                actual = memory_read(x, *memory, top_k=top_k, impl="cpu")
            finally:
                torch.set_num_threads(threads_before)
            torch.testing.assert_close(actual, expected, rtol=2e-6, atol=4e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cpu_kernel_answers_a_token_alike_whatever_its_neighbours(dtype: torch.dtype) -> None:
    x, memory = torch.randn(11, 768).to(dtype), [torch.randn(16, 768), torch.randn(16, 3, 768), torch.randn(16, 3, 768)]
    for top_k in (3, 8, 16):
        together = memory_read(x, *memory, top_k=top_k, impl="cpu")
        for token in range(len(x)):
            alone = memory_read(x[token : token + 1], *memory, top_k=top_k, impl="cpu")
            assert torch.equal(alone[0], together[token])


def test_cpu_kernel_keeps_the_lowest_of_equal_parents_and_takes_nan_for_the_largest() -> None:
    # Every score three times, of whole numbers: exactly equal however a matrix product sums them up.
    x, parents = torch.randint(-4, 5, (9, 24)).float(), torch.randint(-4, 5, (6, 24)).float().repeat(3, 1)
    children = torch.randn(18, 3, 24), torch.randn(18, 3, 24)
    for top_k in range(1, 19):
        expected = memory_read(x, parents, *children, top_k=top_k, impl="reference")
        actual = memory_read(x, parents, *children, top_k=top_k, impl="cpu")
        torch.testing.assert_close(actual, expected, rtol=2e-6, atol=4e-6)
    parents[4] = torch.nan
    assert memory_read(x, parents, *children, top_k=2, impl="cpu").isnan().all()


def test_cpu_kernel_rounds_bfloat16_as_pytorch_does() -> None:
    x, *memory = make_inputs("odd", torch.bfloat16, memory_dtype=torch.float32)
    memory[2][:, :, :5] *= torch.tensor([1e-41, 1e30, 1e38, 1e39, 1e-3])  # subnormal numbers, too large ones
    wide = memory_read(x.float(), *memory, top_k=4, impl="cpu")
    actual = memory_read(x, *memory, top_k=4, impl="cpu")
    torch.testing.assert_close(actual, wide.bfloat16(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    "shape", [*SHAPES, ((1031,), 130, 12, 5, 7)]
)  # several parts, tiles and panels, each with a rest
def test_cpu_kernel_trains_as_the_reference_does(shape: cases.Shape) -> None:
    cases.check_matches(shape, impls=["cpu"])


def test_cpu_kernel_trains_with_bfloat16_states_as_with_float32_rounded_once() -> None:
    inputs = make_inputs(((60,), 70, 16, 3, 8), torch.bfloat16, memory_dtype=torch.float32)
    grad_output = torch.randn_like(inputs[0])
    expected = run([inputs[0].float(), *inputs[1:]], grad_output.float(), top_k=8, impl="cpu")
    actual = run(inputs, grad_output, top_k=8, impl="cpu")
    for name, value in actual.items():
        assert torch.equal(value, expected[name].to(value.dtype)), name


def test_gradients_of_the_cpu_kernel_are_the_same_each_time_and_on_any_thread() -> None:
    inputs, threads_before = make_inputs(((400,), 33, 7, 2, 3), torch.float32), torch.get_num_threads()
    grad_output = torch.randn_like(inputs[0])
    expected = run(inputs, grad_output, top_k=3, impl="reference")
    for threads in (1, 3):
        torch.set_num_threads(threads)
        try:
            first, second = (run(inputs, grad_output, top_k=3, impl="cpu") for _ in range(2))
        finally:
            torch.set_num_threads(threads_before)
        assert all(torch.equal(first[name], second[name]) for name in first)
        assert_all_close(first, expected, **cases.tolerance(torch.float32))


def test_the_cpu_kernels_gradients_can_be_differentiated_and_recomputed() -> None:
    inputs, vector = make_inputs("odd", torch.float32), torch.randn(2, 5, 13)

    def penalty(impl: str, *tensors: Tensor) -> Tensor:
        grads = torch.autograd.grad((read(*tensors, top_k=4, impl=impl) * vector).sum(), tensors, create_graph=True)
        return sum(grad.square().sum() for grad in grads)

    gradients = []
    for impl in ("cpu", "reference"):
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        gradients.append(dict(zip(NAMES, torch.autograd.grad(penalty(impl, *leaves), leaves), strict=True)))
    assert_all_close(*gradients, rtol=1e-4, atol=1e-5)

    def checkpointed(*tensors: Tensor, **options: object) -> Tensor:
        return checkpoint(read, *tensors, use_reentrant=False, impl="cpu", **options)

    expected = run(inputs, vector, top_k=4, impl="cpu")
    actual = run(inputs, vector, function=checkpointed, top_k=4)
    assert all(torch.equal(actual[name], value) for name, value in expected.items())


def test_cpu_kernel_refuses_what_it_cannot_do(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs("odd", torch.float32)
    with pytest.raises(ValueError, match=r"impl is 'cpu', but the compiled kernels read plain float32 tensors"):
        memory_read(*make_inputs("odd"), top_k=4, impl="cpu")
    expected = memory_read(*inputs, top_k=4, impl="cpu")
    (kernel,) = (each for each in choice.OPERATOR._ranked if each.name == "cpu")
    monkeypatch.setitem(kernel.__dict__, "why_unavailable", lambda: "no C++ compiler was found.")
    with pytest.raises(RuntimeError, match=r"impl is 'cpu', but no C\+\+ compiler was found"):
        memory_read(*inputs, top_k=4, impl="cpu")
    torch.testing.assert_close(memory_read(*inputs, top_k=4), expected)


@pytest.mark.parametrize("wide", NAMES[1:])
def test_a_wider_tensor_of_the_memory_is_not_read_as_float32(wide: str) -> None:
    inputs = dict(zip(NAMES, make_inputs("odd", torch.float32), strict=True))
    expected = memory_read(*inputs.values(), top_k=4, impl="reference")
    inputs[wide] = inputs[wide].double()
    torch.testing.assert_close(memory_read(**inputs, top_k=4), expected, rtol=1e-5, atol=1e-6)
    inputs[wide] = inputs[wide].to("meta", torch.float32)
    with pytest.raises(ValueError, match=f"different devices.*{wide} on meta.*move them to one"):
        memory_read(**inputs, top_k=4)


def test_tensors_without_memory_of_their_own_are_not_read_by_compiled_code() -> None:
    inputs = make_inputs("odd", torch.float32)
    expected = memory_read(*inputs, top_k=4, impl="reference")
    rows = torch.func.vmap(lambda x: memory_read(x, *inputs[1:], top_k=4))(inputs[0])
    torch.testing.assert_close(rows, expected, rtol=1e-5, atol=1e-6)
    with forward_ad.dual_level(), torch.no_grad():
        dual = forward_ad.make_dual(inputs[0], torch.ones_like(inputs[0]))
        assert forward_ad.unpack_dual(memory_read(dual, *inputs[1:], top_k=4)).tangent is not None
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        fake = [mode.from_tensor(tensor) for tensor in inputs]
        assert memory_read(*fake, top_k=4).shape == expected.shape


# Errors


BAD_ARGUMENTS = [
    ({"top_k": 0}, ValueError, "top_k is 0, but the memory has 7 parents"),
    ({"top_k": 8}, ValueError, "top_k is 8, but the memory has 7 parents"),
    ({"top_k": 2.0}, TypeError, "top_k is 2.0; expected an int"),
    ({"top_k": True}, TypeError, "top_k is True; expected an int"),
    ({"temperature": 0.0}, ValueError, "temperature is 0.0; expected a positive"),
    ({"temperature": float("nan")}, ValueError, "temperature is nan"),
    ({"impl": "fast"}, ValueError, "impl is 'fast'; expected one of auto, triton, cpu, torch, reference"),
    ({"impl": "masked"}, ValueError, "impl is 'masked'; it is called 'torch' now"),
    ({"x": torch.ones(2, 5, 13, dtype=torch.long)}, TypeError, "x has dtype torch.int64; expected a floating"),
    ({"x": torch.ones(())}, ValueError, "x is a scalar"),
    ({"x": torch.ones(2, 5, 12)}, ValueError, r"last dimensions differ \(x 12, parent_keys 13"),
    ({"parent_keys": torch.ones(1, 7, 13)}, ValueError, r"parent_keys has shape \(1, 7, 13\); expected \(P, D\)"),
    ({"child_keys": torch.ones(21, 13)}, ValueError, r"child_keys has shape \(21, 13\); expected \(P, C, D\)"),
    ({"child_keys": torch.ones(6, 3, 13)}, ValueError, "child_keys is for 6 parents, parent_keys for 7"),
    ({"child_values": torch.ones(7, 2, 13)}, ValueError, "child_keys has 3 children per parent, child_values 2"),
    ({"child_keys": torch.ones(7, 0, 13), "child_values": torch.ones(7, 0, 13)}, ValueError, "at least one child"),
]


def test_bad_arguments() -> None:
    inputs = dict(zip(NAMES, make_inputs("odd", torch.float32), strict=True))
    for changes, error, message in BAD_ARGUMENTS:
        with pytest.raises(error, match=message):
            memory_read(**{**inputs, "top_k": 4, **changes})
