"""What holds for any call of any operation, on the CPU kernels: hypothesis draws the calls.

The long run: pytest tests/test_properties.py --cases 100000 --hypothesis-seed 7
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

import famseg_kernels as fk
from famseg_kernels.testing import gate, tolerance
from tests.judging import (
    LAYOUTS,
    MACHINES,
    Copy,
    Layout,
    Machine,
    agree,
    arranged,
    compare,
    judge,
    meets_zeros,
    reference,
    spoiled,
    truth,
)
from tests.native import needs_native
from tests.strategies import (
    ANY_DTYPE,
    CHUNKS,
    FORMS,
    Call,
    Image,
    Reassembly,
    Strips,
    Tokens,
    Upsample,
    calls,
    exact,
    images,
    reassemblies,
    strips,
    tokens,
    upsamples,
    with_an_interior,
)

pytestmark = [needs_native, pytest.mark.filterwarnings("ignore:TF32 acceleration")]  # torch's own flags() asks for it
each_operation = pytest.mark.parametrize("name", FORMS)
WIDE = st.sampled_from([torch.float32, torch.float64, torch.bfloat16])  # with the range of fp32


def run(call: Call, args: Sequence[Any]) -> list[Tensor]:
    return gate.call(call.operation, args, "cpu")


# --- any call -------------------------------------------------------------------------------------------------------


@each_operation
@given(data=st.data(), machine=MACHINES, layouts=LAYOUTS)
def test_any_call_is_right_in_any_layout_on_any_instruction_set(
    name: str, data: st.DataObject, machine: Machine, layouts: list[Layout]
) -> None:
    call = data.draw(calls(FORMS[name]()))
    args = call.arguments()
    given_args, _ = gate.with_gradients(call.operation, args, False, arranged(layouts))
    found = judge(call, args, machine, lambda: arranged(layouts))
    fake = call.operation.spec.fake(*given_args)
    for a, b in zip(found, fake if isinstance(fake, list) else [fake], strict=False):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


@each_operation
@given(data=st.data())
def test_what_is_empty_or_a_single_number_is_right(name: str, data: st.DataObject) -> None:
    """Each size is 0 or 1, of the image and of all that goes with it."""
    few = st.sampled_from([1, 1, 1, 0])
    shape = data.draw(st.tuples(few, few, few, few))
    n, c = shape[:2]
    state = data.draw(few)
    form = {
        "strip_conv2d": Strips(shape, 1, ((1, 1),), True, True, True),
        "ssd_scan_2d": Image((*shape, n), state, 1, 4, False, "heads", True, None, True, (0.0, math.inf)),
        "ssd_scan": Tokens(
            shape, state, 1, "channels", True, True, True, torch.int64, (0, 0, c) if n == 1 else None, final=state == 1
        ),
        "reassemble": Reassembly(name, shape, 1, 1, 1),
        "carafe": Reassembly(name, shape, 1, 1, 1),
        "feature_aware_upsample": Upsample(shape, 1, 1, 1, state, 1, 1, True),
    }[name]
    call = Call(form, data.draw(ANY_DTYPE), data.draw(st.integers(0, 9)))
    judge(call, call.arguments(), Machine("baseline", 1))


@each_operation
@given(data=st.data())
def test_a_gradient_does_not_depend_on_which_others_are_wanted(name: str, data: st.DataObject) -> None:
    call = data.draw(calls(FORMS[name]()))
    found = gate.outcome(call.operation, call.arguments(), "cpu")
    args, leaves = gate.with_gradients(call.operation, call.arguments(), False)
    wanted = data.draw(st.sets(st.sampled_from(range(len(leaves))), min_size=1))
    for i in wanted:
        leaves[i].requires_grad_()
    results = run(call, args)
    alone = torch.autograd.grad(results, [leaves[i] for i in wanted], gate.cotangents(results))
    for i, gradient in zip(wanted, alone, strict=True):
        found[len(results) + i] = gradient
    args = call.arguments()
    compare(call, args, found, reference(call, args, gate.copied), truth(call, args, gate.copied))


PUBLIC: dict[str, Callable[..., Any]] = {
    "strip_conv2d": lambda x, square, bias, rows, of_rows, cols, of_cols: fk.strip_conv2d(
        x, square, bias, iter(rows), of_rows or None, tuple(cols), of_cols or [None] * len(cols)
    ),
    "ssd_scan_2d": lambda x, dt, A, B, C, D, bias, chunk, softplus, *limit: fk.ssd_scan_2d(
        x, dt, A, B, C, D, dt_bias=bias, dt_softplus=softplus, dt_limit=limit, chunk_size=chunk
    ),
    "ssd_scan": lambda x, dt, A, B, C, D, z, bias, initial, ids, bounds, chunk, softplus, low, high, *asked: (
        fk.ssd_scan(x, dt, A, B, C, chunk, D, z, bias, initial, ids, bounds, softplus, (low, high), *asked)
    ),
    "reassemble": fk.reassemble,
    "carafe": fk.carafe,
    "feature_aware_upsample": fk.feature_aware_upsample,
}


@each_operation
@given(data=st.data())
def test_the_public_function_takes_any_call(name: str, data: st.DataObject) -> None:
    call = data.draw(calls(FORMS[name]()))
    args = call.arguments()
    with fk.use_backend("cpu"):
        found = PUBLIC[name](*args)
    expected = run(call, args)
    if name == "ssd_scan" and args[9] is not None and args[15] and args[0].shape[1]:
        expected[1] = expected[1].masked_fill((args[9][:, -1] < 0)[:, None, None, None], 0.0)
    found = found if isinstance(found, tuple) else (found,)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@given(call=calls(strips(empty=False)), data=st.data())
def test_a_bias_that_is_missing_among_others_is_zero(call: Call, data: st.DataObject) -> None:
    x, square, bias, rows, of_rows, cols, of_cols = call.arguments()
    kept = [data.draw(st.booleans()) for _ in of_rows]
    some = [b if keep else None for b, keep in zip(of_rows, kept, strict=True)]
    zeros = [b if keep else torch.zeros_like(b) for b, keep in zip(of_rows, kept, strict=True)]
    with fk.use_backend("cpu"):
        found = fk.strip_conv2d(x, square, bias, rows, some or None, cols, of_cols or None)
        assert torch.equal(found, fk.strip_conv2d(x, square, bias, rows, zeros or None, cols, of_cols or None))


@each_operation
@given(data=st.data())
def test_each_image_or_sequence_is_computed_by_itself(name: str, data: st.DataObject) -> None:
    call = data.draw(exact(FORMS[name](empty=False)).filter(lambda call: getattr(call.form, "bounds", None) is None))
    args = call.arguments()
    pick = data.draw(st.lists(st.integers(0, len(args[0]) - 1), max_size=4))
    flat = call.operation.flatten(args)
    picked = [t[pick] if i in call.form.batched and t is not None else t for i, t in enumerate(flat)]
    results = run(call, args)
    for found, whole in zip(run(call, call.operation.replace(args, picked)), results, strict=True):
        agree(found, whole[pick])


LINEAR = {
    "strip_conv2d": [(strips(biases=False), 0)],
    "ssd_scan_2d": [(images(), 0)],
    "ssd_scan": [(tokens(plain=True), 0)],
    "reassemble": [(reassemblies("reassemble"), 0)],
    "carafe": [(reassemblies("carafe"), 0), (reassemblies("carafe"), 1)],
    "feature_aware_upsample": [(upsamples(), 0)],
}


@pytest.mark.parametrize(
    ("forms", "place"), [pytest.param(*row, id=f"{name}-{row[1]}") for name, rows in LINEAR.items() for row in rows]
)
@given(data=st.data(), factor=st.floats(-8, 8))
def test_the_result_is_linear_in_what_is_summed(forms: Any, place: int, data: st.DataObject, factor: float) -> None:
    call = data.draw(exact(forms))
    args = call.arguments()
    other = torch.randn(args[place].shape, generator=call.random(), dtype=torch.float64)

    def at(value: Tensor) -> list[Tensor]:
        return run(call, [*args[:place], value, *args[place + 1 :]])

    for found, one, two in zip(at(factor * args[place] + other), at(args[place]), at(other), strict=True):
        agree(found, factor * one + two)


# --- strips ---------------------------------------------------------------------------------------------------------


@given(call=exact(strips()), dims=st.sets(st.sampled_from([2, 3])))
def test_strips_of_a_mirrored_image_are_mirrored(call: Call, dims: set[int]) -> None:
    x, square, bias, rows, of_rows, cols, of_cols = call.arguments()

    def mirrored(t: Tensor) -> Tensor:
        return t.flip(*dims) if dims else t

    weights = [None if square is None else mirrored(square), [mirrored(t) for t in rows], [mirrored(t) for t in cols]]
    found = run(call, [mirrored(x), weights[0], bias, weights[1], of_rows, weights[2], of_cols])[0]
    agree(found, mirrored(run(call, call.arguments())[0]))


@given(call=exact(strips(biases=False)))
def test_strips_of_a_transposed_image_are_transposed(call: Call) -> None:
    """Without biases: a branch adds the row's before it sums down the columns."""
    x, square, bias, rows, of_rows, cols, of_cols = call.arguments()
    turned = [None if square is None else square.mT, [t.mT for t in cols], [t.mT for t in rows]]
    found = run(call, [x.mT, turned[0], bias, turned[1], of_rows, turned[2], of_cols])[0]
    agree(found, run(call, call.arguments())[0].mT)


@given(call=exact(strips(empty=False)), data=st.data())
def test_channels_of_strips_do_not_see_each_other(call: Call, data: st.DataObject) -> None:
    args = call.arguments()
    pick = data.draw(st.lists(st.integers(0, args[0].shape[1] - 1), min_size=1, max_size=20))
    x, *weights = call.operation.flatten(args)
    picked = [x[:, pick], *(None if t is None else t[pick] for t in weights)]
    agree(run(call, call.operation.replace(args, picked))[0], run(call, args)[0][:, pick])


# --- reassembly -----------------------------------------------------------------------------------------------------


@given(call=calls(with_an_interior()), value=st.sampled_from([1.0, -3.0, 1000.0, 2.0**-10]))
def test_a_constant_image_stays_constant_inside_the_window_s_reach(call: Call, value: float) -> None:
    x, *rest = call.arguments()
    (y,) = run(call, [torch.full_like(x, value), *rest])
    border = call.form.k // 2 * call.form.s
    inside = y[..., border : y.shape[2] - border, border : y.shape[3] - border]
    assert inside.numel()
    agree(inside / value, torch.ones_like(inside))


@given(call=calls(reassemblies("reassemble") | upsamples()), power=st.integers(-6, 6))
def test_an_average_lies_between_the_least_and_the_most(call: Call, power: int) -> None:
    """Of the window and the zero outside the image; so the largest number of the dtype does not overflow."""
    x, *rest = call.arguments()
    x = x.sign() * torch.finfo(x.dtype).max if power == 6 else x * 2.0**power
    (y,) = run(call, [x, *rest])
    if y.numel():
        slack = 1 + tolerance.EPSILON[y.dtype]
        assert min(float(x.min()), 0.0) * slack <= float(y.min()) and float(y.max()) <= max(float(x.max()), 0.0) * slack


@given(call=exact(reassemblies("reassemble")), size=st.sampled_from([1e-3, 1.0, 100.0]))
def test_what_all_taps_add_to_their_logits_does_not_matter(call: Call, size: float) -> None:
    x, logits, k, s, g = call.arguments()
    n, _, h, w = x.shape
    shift = size * torch.randn(n, g, 1, s * s, h, w, generator=call.random(), dtype=x.dtype)
    shifted = (logits.view(n, g, k * k, s * s, h, w) + shift).view_as(logits)
    agree(run(call, [x, shifted, k, s, g])[0], run(call, [x, logits, k, s, g])[0])


# --- scans ----------------------------------------------------------------------------------------------------------


def seen_otherwise(args: list[Any], turn: Copy, order: list[int]) -> list[Any]:
    """The scan of the image as `turn` shows it, each direction with what the one in its place in `order` had."""
    x, dt, A, B, C, D, bias, *options = args
    matrices = [turn(t) if t.shape[3] == 1 else turn(t)[:, :, :, order] for t in (B, C)]
    D = D[order] if D is not None and D.dim() == 2 else D
    return [turn(x), turn(dt)[..., order, :], A[order], *matrices, D, None if bias is None else bias[order], *options]


@given(call=exact(images(directions=(2, 4))))
def test_an_image_turned_half_is_scanned_with_its_directions_swapped(call: Call) -> None:
    def turn(t: Tensor) -> Tensor:
        return t.flip(1, 2)

    order = [1, 0, 3, 2][: call.form.directions]
    agree(run(call, seen_otherwise(call.arguments(), turn, order))[0], turn(run(call, call.arguments())[0]))


@given(call=exact(images(directions=(4,))))
def test_a_transposed_image_is_scanned_with_rows_for_columns(call: Call) -> None:
    def turn(t: Tensor) -> Tensor:
        return t.transpose(1, 2)

    agree(run(call, seen_otherwise(call.arguments(), turn, [2, 3, 0, 1]))[0], turn(run(call, call.arguments())[0]))


@pytest.mark.parametrize("name", ["ssd_scan_2d", "ssd_scan"])
@given(data=st.data(), chunk_size=CHUNKS)
def test_chunk_size_does_not_matter(name: str, data: st.DataObject, chunk_size: int | None) -> None:
    call = data.draw(exact(FORMS[name]()))
    args = call.arguments()
    place = 7 if name == "ssd_scan_2d" else 11
    other = [*args[:place], chunk_size, *args[place + 1 :]]
    for a, b in zip(*(gate.outcome(call.operation, mine, "cpu") for mine in (other, args)), strict=True):
        agree(a, b)


@given(call=calls(tokens(), WIDE), data=st.data(), size=st.sampled_from([1.0, 1000.0]))
def test_a_token_changes_nothing_before_it(call: Call, data: st.DataObject, size: float) -> None:
    args, at = call.arguments(), data.draw(st.integers(0, call.form.shape[1]))
    changed = gate.with_gradients(call.operation, args, False)[0]
    for place in (0, 1, 3, 4, 6):
        if changed[place] is not None:
            future = changed[place][:, at:]
            future.copy_(size * torch.randn(future.shape, generator=call.random(), dtype=torch.float64))
            if place == 1:
                future.abs_()
    assert torch.equal(run(call, changed)[0][:, :at], run(call, args)[0][:, :at])


@given(call=calls(tokens(), WIDE), data=st.data())
def test_no_gradient_reaches_a_later_token(call: Call, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, call.form.shape[1]))
    args, leaves = gate.with_gradients(call.operation, call.arguments())
    y = run(call, args)[0]
    gradient = torch.ones_like(y)
    gradient[:, at:] = 0
    torch.autograd.backward(y, gradient)
    places = [i for i, t in enumerate(call.operation.flatten(args)) if t is not None and t.is_floating_point()]
    for place, leaf in zip(places, leaves, strict=True):
        if place in (0, 1, 3, 4, 6):
            assert leaf.grad is not None and not leaf.grad[:, at:].any()


def sequence(args: Sequence[Any], tokens: slice, initial: Tensor | None) -> list[Any]:
    """Some tokens alone, with nothing of what packs sequences, and the state after them."""
    x, dt, A, B, C, D, z, bias, _, _, _, *options = args
    x, dt, B, C, z = (t if t is None else t[:, tokens] for t in (x, dt, B, C, z))
    return [x, dt, A, B, C, D, z, bias, initial, None, None, *options[:4], True, False]


@given(call=exact(tokens(batch=1)), data=st.data())
def test_a_scan_may_be_cut_anywhere(call: Call, data: st.DataObject) -> None:
    args, at = call.arguments(), data.draw(st.integers(0, call.form.shape[1]))
    whole, final = run(call, sequence(args, slice(None), args[8]))
    first, state = run(call, sequence(args, slice(0, at), args[8]))
    second, last = run(call, sequence(args, slice(at, None), state))
    agree(torch.cat([first, second], 1), whole)
    agree(last, final)


@given(call=exact(tokens(batch=1, longest=30)), data=st.data())
def test_packed_sequences_do_not_see_each_other(call: Call, data: st.DataObject) -> None:
    args, length = call.arguments(), call.form.shape[1]
    cuts = sorted(data.draw(st.sets(st.integers(1, max(length, 1)), max_size=4)) & set(range(length)))
    packed = sequence(args, slice(None), args[8])
    packed[9] = torch.bucketize(torch.arange(length), torch.tensor(cuts), right=True).expand(len(args[0]), -1)
    alone = [
        run(call, sequence(args, slice(start, end), args[8] if start == 0 else None))
        for start, end in zip([0, *cuts], [*cuts, length], strict=True)
    ]
    y, final = run(call, packed)
    agree(y, torch.cat([part for part, _ in alone], 1))
    agree(final, alone[-1][1])


# --- what is not finite, and what nearly is -------------------------------------------------------------------------

SHORT = {"ssd_scan_2d": images(empty=False, pixels=24), "ssd_scan": tokens(empty=False, longest=24)}


@each_operation
@given(data=st.data(), value=st.sampled_from([math.nan, math.inf, -math.inf]))
def test_what_is_not_finite_goes_where_the_definition_sends_it(name: str, data: st.DataObject, value: float) -> None:
    call = data.draw(calls(SHORT[name] if name in SHORT else FORMS[name](empty=False)))
    args = call.arguments()
    flat = call.operation.flatten(args)
    order = [i for i, t in enumerate(flat) if t is not None]  # the places as `copy` meets them
    weights = [i for i in order if meets_zeros(call, i)]
    leaves = [i for i in order if flat[i].is_floating_point()]
    results = run(call, args)
    of_results = range(len(order), len(order) + len(results))
    sources = [order.index(i) for i in leaves if i not in weights or name == "carafe"]
    source = data.draw(st.sampled_from([*sources, *of_results]))
    tensor = flat[order[source]] if source < len(order) else results[source - len(order)]
    assume(tensor.numel())
    index = data.draw(st.integers(0, tensor.numel() - 1))
    found = gate.outcome(call.operation, args, "cpu", copy=spoiled(source, index, value))
    right = truth(call, args, spoiled(source, index, value))
    for place, a, b in zip([None] * len(results) + leaves, found, right, strict=True):
        bad, most = ~a.isfinite(), ~b.isfinite()
        if place in weights or (source < len(order) and order[source] in weights):
            within = most.flatten(1).any(1)[:, None, None, None] if name == "strip_conv2d" else most
            assert not (bad & ~within).any()
            assert bad.any() or not most.any() or place not in weights  # a middle tap meets no zeros
        else:
            assert torch.equal(bad, most), f"of argument {place}: {bad.sum()} places instead of {most.sum()}"


def scaled(call: Call, data: st.DataObject, sizes: Sequence[float]) -> list[Any]:
    """Each floating-point argument by a size of its own; not those of an exponential."""
    kept = {"ssd_scan_2d": (1, 2, 6), "ssd_scan": (1, 2, 7), "reassemble": (1,), "feature_aware_upsample": (1, 2, 3)}
    flat = call.operation.flatten(call.arguments())
    return call.operation.replace(
        call.arguments(),
        [
            t * data.draw(st.sampled_from(sizes))
            if t is not None and t.is_floating_point() and i not in kept.get(call.form.name, ())
            else t
            for i, t in enumerate(flat)
        ],
    )


@each_operation
@given(data=st.data(), machine=MACHINES)
def test_a_million_and_a_millionth_are_right(name: str, data: st.DataObject, machine: Machine) -> None:
    call = data.draw(calls(FORMS[name](), WIDE))
    judge(call, scaled(call, data, (1e-6, 1.0, 1e6)), machine)


@each_operation
@given(data=st.data(), machine=MACHINES)
def test_the_smallest_numbers_of_half_precision_are_right(name: str, data: st.DataObject, machine: Machine) -> None:
    call = data.draw(calls(FORMS[name](), st.just(torch.float16)))
    judge(call, scaled(call, data, (1e-6, 1e-4, 1.0)), machine)


@each_operation
@given(data=st.data(), machine=MACHINES, size=st.sampled_from([1e-40, 1e-45, 1e-310]))
def test_subnormal_numbers_do_no_harm_among_others(
    name: str, data: st.DataObject, machine: Machine, size: float
) -> None:
    """A kernel may take them for zeros. It leaves the caller's arithmetic as it was."""
    call = data.draw(calls(FORMS[name](), WIDE))
    flat = [
        t.where(torch.rand(t.shape, generator=call.random()) < 0.7, size)
        if t is not None and t.is_floating_point()
        else t
        for t in call.operation.flatten(call.arguments())
    ]
    judge(call, call.operation.replace(call.arguments(), flat), machine)
    assert float(torch.tensor(1e-30) * torch.tensor(1e-10)) > 0


STEPS = st.lists(st.sampled_from([-1e3, -30.0, -1e-6, 0.0, 1e-30, 1e-6, 0.3, 30.0, 1e3, 1e6]), min_size=1, max_size=5)
RATES = st.lists(st.sampled_from([-1e-30, -1e-6, -0.5, -1e3, -1e9]), min_size=1, max_size=3)


@pytest.mark.parametrize("name", ["ssd_scan_2d", "ssd_scan"])
@given(data=st.data(), machine=MACHINES, steps=STEPS, rates=RATES)
def test_any_step_and_any_decay_are_right(
    name: str, data: st.DataObject, machine: Machine, steps: list[float], rates: list[float]
) -> None:
    call = data.draw(calls(FORMS[name](), WIDE))
    assume(call.form.dt_limit[0] >= 0)  # a step below 0 makes the state grow
    args = call.arguments()
    for place, sizes in ((1, steps), (2, rates)):
        chosen = torch.randint(len(sizes), args[place].shape, generator=call.random())
        args[place] = torch.tensor(sizes, dtype=torch.float64)[chosen].to(args[place])
    if not call.form.softplus:
        args[1] = args[1].abs()
    judge(call, args, machine)


@each_operation
@given(data=st.data(), machine=MACHINES, part=st.sampled_from([0.4, 1.0, 3.0, 10.0]))
def test_half_precision_overflows_where_the_result_does(
    name: str, data: st.DataObject, machine: Machine, part: float
) -> None:
    """The largest result is `part` of the largest number. What overflows is infinite, all else is right."""
    call = data.draw(calls(LINEAR[name][0][0], st.just(torch.float16)))
    first, *rest = call.arguments()
    largest = max((float(y.double().abs().max()) for y in run(call, [first, *rest]) if y.numel()), default=0.0)
    assume(largest > 0)
    limit = torch.finfo(torch.float16).max
    args = [(first.double() * (part * limit / largest)).clamp(-limit, limit).half(), *rest]
    with machine.running():
        found = gate.outcome(call.operation, args, "cpu")
    inside = []
    for a, e, t in zip(found, reference(call, args, gate.copied), truth(call, args, gate.copied), strict=True):
        most = torch.finfo(a.dtype).max
        assert not (a.isfinite() & (t.abs() > 2 * most)).any()
        assert not (~a.isfinite() & (t.abs() < most / 2)).any()
        within = a.isfinite() & e.isfinite()
        inside.append([x.where(within, 0) for x in (a, e, t)])
    compare(call, args, *zip(*inside, strict=True))
