"""What is special to the scans: the recurrence, mamba's options, directions, and a spike in dt."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import famseg_kernels as fk
from famseg_kernels.ssd_scan.reference import recurrence

EVERYWHERE = [name for name, reason in fk.available_backends().items() if reason == "ok" and name != "cuda"]


def scan_arguments(b=2, length=23, heads=4, headdim=3, groups=2, state=5, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)

    def rand(*shape):
        return torch.randn(*shape, generator=g, dtype=dtype)

    x, dt = rand(b, length, heads, headdim), rand(b, length, heads).abs() * 0.5
    A = -rand(heads).abs() - 0.1
    return x, dt, A, rand(b, length, groups, state), rand(b, length, groups, state)


@pytest.mark.parametrize("chunk_size", [None, 1, 4, 7, 23, 500])
def test_scan_is_the_recurrence_for_every_chunk_size(chunk_size):
    args = scan_arguments()
    torch.testing.assert_close(fk.ssd_scan(*args, chunk_size), recurrence(*args), rtol=1e-12, atol=1e-12)


def test_options_mean_what_they_mean_in_mamba():
    x, dt, A, B, C = scan_arguments()
    g = torch.Generator().manual_seed(1)
    bias, D = torch.randn(4, generator=g, dtype=x.dtype), torch.randn(4, 3, generator=g, dtype=x.dtype)
    z = torch.randn(x.shape, generator=g, dtype=x.dtype)
    step = F.softplus(dt + bias).clamp(0.2, 0.9)
    expected = (recurrence(x, step, A, B, C) + D * x) * F.silu(z)
    y = fk.ssd_scan(x, dt, A, B, C, 8, D, z, bias, dt_softplus=True, dt_limit=(0.2, 0.9))
    torch.testing.assert_close(y, expected)


def test_states_carry_a_sequence_over_two_calls():
    x, dt, A, B, C = scan_arguments()
    whole, final = fk.ssd_scan(x, dt, A, B, C, 5, return_final_states=True)
    first, state = fk.ssd_scan(x[:, :9], dt[:, :9], A, B[:, :9], C[:, :9], 4, return_final_states=True)
    second, last = fk.ssd_scan(
        x[:, 9:], dt[:, 9:], A, B[:, 9:], C[:, 9:], 4, initial_states=state, return_final_states=True
    )
    torch.testing.assert_close(torch.cat([first, second], 1), whole)
    torch.testing.assert_close(last, final)


def test_a_change_of_seq_idx_resets_the_state_and_packs_sequences():
    x, dt, A, B, C = scan_arguments(b=1)
    seq_idx = torch.tensor([[0] * 6 + [1] * 1 + [2] * 16], dtype=torch.int32)
    bounds = torch.tensor([0, 6, 7, 23], dtype=torch.int32)
    initial = torch.randn(1, 4, 3, 5, dtype=x.dtype)
    y, final, packed = fk.ssd_scan(
        x, dt, A, B, C, 4, initial_states=initial, seq_idx=seq_idx, cu_seqlens=bounds,
        return_final_states=True, return_varlen_states=True,
    )  # fmt: skip
    for i, (start, end) in enumerate([(0, 6), (6, 7), (7, 23)]):
        part = slice(start, end)
        own = initial if i == 0 else None
        alone, state = fk.ssd_scan(
            x[:, part], dt[:, part], A, B[:, part], C[:, part], initial_states=own, return_final_states=True
        )
        torch.testing.assert_close(y[:, part], alone)
        torch.testing.assert_close(packed[i : i + 1], state)
    torch.testing.assert_close(final, packed[-1:])


def test_the_initial_state_belongs_to_seq_idx_zero():
    x, dt, A, B, C = scan_arguments(b=1)
    seq_idx = torch.ones(1, 23, dtype=torch.int64)
    y = fk.ssd_scan(x, dt, A, B, C, initial_states=torch.randn(1, 4, 3, 5, dtype=x.dtype), seq_idx=seq_idx)
    torch.testing.assert_close(y, fk.ssd_scan(x, dt, A, B, C))


def test_varlen_states_come_without_final_states_too():
    x, dt, A, B, C = scan_arguments(b=1)
    result = fk.ssd_scan(x, dt, A, B, C, cu_seqlens=torch.tensor([0, 23]), return_varlen_states=True)
    assert [tuple(t.shape) for t in result] == [(1, 23, 4, 3), (1, 4, 3, 5)]


def image_arguments(directions=4, shared=False, n=2, h=3, w=5, heads=2, headdim=3, groups=1, state=4):
    g = torch.Generator().manual_seed(2)

    def rand(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    k = 1 if shared else directions
    return (
        rand(n, h, w, heads, headdim),
        rand(n, h, w, directions, heads).abs(),
        -rand(directions, heads).abs(),
        rand(n, h, w, k, groups, state),
        rand(n, h, w, k, groups, state),
    )


def paths(h, w):
    rows = [(i, j) for i in range(h) for j in range(w)]
    cols = [(i, j) for j in range(w) for i in range(h)]
    return [rows, rows[::-1], cols, cols[::-1]]


@pytest.mark.parametrize("directions", [1, 2, 4])
@pytest.mark.parametrize("shared", [False, True])
def test_an_image_is_scanned_along_its_documented_paths(directions, shared):
    x, dt, A, B, C = image_arguments(directions, shared)
    expected = torch.zeros_like(x)
    for k, path in enumerate(paths(3, 5)[:directions]):
        i, j = (torch.tensor(axis) for axis in zip(*path, strict=True))
        source = 0 if shared else k
        sequence = recurrence(x[:, i, j], dt[:, i, j, k], A[k], B[:, i, j, source], C[:, i, j, source])
        expected[:, i, j] += sequence
    torch.testing.assert_close(fk.ssd_scan_2d(x, dt, A, B, C), expected)
    D = torch.tensor([0.5, -2.0], dtype=x.dtype)
    torch.testing.assert_close(fk.ssd_scan_2d(x, dt, A, B, C, D), expected + D[:, None] * x)
    per_direction = torch.randn(directions, 2, dtype=x.dtype)
    torch.testing.assert_close(
        fk.ssd_scan_2d(x, dt, A, B, C, per_direction), expected + per_direction.sum(0)[:, None] * x
    )


@pytest.mark.parametrize("backend", [name for name, reason in fk.available_backends().items() if reason == "ok"])
def test_a_spike_in_dt_does_not_spoil_its_neighbours(backend):
    g = torch.Generator().manual_seed(3)
    x = torch.randn(1, 200, 1, 4, generator=g)
    dt = torch.full((1, 200, 1), 0.3)
    dt[0, 100:104] = 1000.0
    A, B, C = torch.tensor([-1.0]), torch.randn(1, 200, 1, 8, generator=g), torch.randn(1, 200, 1, 8, generator=g)
    truth = recurrence(*(t.double() for t in (x, dt, A, B, C)))
    if backend not in fk.OPERATIONS[2].implementations:
        pytest.skip(f"{backend} has no kernel for ssd_scan")
    with fk.use_backend(backend):
        y = fk.ssd_scan(x, dt, A, B, C, 128)
    calm = torch.cat([torch.arange(100), torch.arange(120, 200)])
    torch.testing.assert_close(y[:, calm].double(), truth[:, calm], rtol=1e-5, atol=1e-5)


def test_autocast_casts_the_data_and_leaves_the_decay():
    x, dt, A, B, C = (t.float() for t in image_arguments())
    with torch.autocast("cpu", torch.bfloat16):
        y = fk.ssd_scan_2d(x, dt, A, B, C)
    assert y.dtype == torch.bfloat16
    exact = fk.ssd_scan_2d(x.bfloat16(), dt, A, B.bfloat16(), C.bfloat16())
    torch.testing.assert_close(y, exact, rtol=0, atol=0)


@pytest.mark.parametrize("backend", EVERYWHERE)
@pytest.mark.parametrize("name", ["dt", "A", "D", "dt_bias", "initial_states"])
def test_parameters_may_be_fp32_beside_fp64(name, backend):
    """As exact as if they were fp64, and their gradients are fp32."""
    x, dt, A, B, C = scan_arguments()
    g = torch.Generator().manual_seed(1)
    tensors = {"x": x, "dt": dt, "A": A, "B": B, "C": C}
    for other, shape in {"D": (4,), "dt_bias": (4,), "initial_states": (2, 4, 3, 5)}.items():
        tensors[other] = torch.randn(shape, generator=g, dtype=x.dtype)
    tensors[name] = tensors[name].float()
    if backend == "triton":
        pytest.skip("has no fp64")

    def run(**arguments):
        leaves = {key: t.detach().requires_grad_() for key, t in arguments.items()}
        with fk.use_backend(backend):
            y, final = fk.ssd_scan(**leaves, dt_softplus=True, return_final_states=True)
        (y.square().sum() + final.square().sum()).backward()
        return [y, final], {key: t.grad for key, t in leaves.items()}

    results, gradients = run(**tensors)
    wide_results, wide_gradients = run(**tensors | {name: tensors[name].double()})
    torch.testing.assert_close(results, wide_results, rtol=1e-13, atol=1e-13)
    assert gradients[name].dtype == torch.float32
    torch.testing.assert_close(gradients.pop(name), wide_gradients.pop(name).float())
    torch.testing.assert_close(gradients, wide_gradients, rtol=1e-13, atol=1e-13)


def test_parameters_of_an_image_may_be_fp32_beside_fp64():
    x, dt, A, B, C = image_arguments()
    D = torch.tensor([0.5, -2.0])
    y = fk.ssd_scan_2d(x, dt.float(), A.float(), B, C, D, dt_bias=A.float())
    exact = fk.ssd_scan_2d(x, dt.float().double(), A.float().double(), B, C, D.double(), dt_bias=A.float().double())
    torch.testing.assert_close(y, exact, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("backend", EVERYWHERE)
@pytest.mark.parametrize("padding", [1, 3, 20])
def test_padding_adds_nothing_and_has_no_state(backend, padding):
    x, dt, A, B, C = (t.float() for t in scan_arguments())
    seq_idx = torch.tensor([[0] * 9 + [1] * 14] * 2, dtype=torch.int32)
    seq_idx[1, 23 - padding :] = -1
    args = [t.requires_grad_() for t in (x, dt, A, B, C)]
    with fk.use_backend(backend):
        y, final = fk.ssd_scan(*args, 8, seq_idx=seq_idx, return_final_states=True)
        alone, whole = fk.ssd_scan(*args, 8, seq_idx=seq_idx.clamp(min=0), return_final_states=True)
    assert not final[1].any()
    torch.testing.assert_close(final[0], whole[0])
    torch.testing.assert_close(y[1, : 23 - padding], alone[1, : 23 - padding])
    gradients = torch.autograd.grad(final, args, torch.ones_like(final))
    assert not any(gradients[place][1].any() for place in (0, 1, 3))


def test_padding_ahead_of_a_sequence_does_not_reach_it():
    x, dt, A, B, C = scan_arguments(b=1)
    seq_idx = torch.tensor([[-1] * 5 + [0] * 18])
    y, final = fk.ssd_scan(x, dt, A, B, C, 4, seq_idx=seq_idx, return_final_states=True)
    alone = fk.ssd_scan(x[:, 5:], dt[:, 5:], A, B[:, 5:], C[:, 5:], return_final_states=True)
    torch.testing.assert_close((y[:, 5:], final), alone)


def test_states_come_in_state_dtype_as_in_mamba():
    x, dt, A, B, C = (t.float() for t in scan_arguments(b=1))
    bounds = torch.tensor([0, 9, 23])
    mamba = (8, None, None, None, None, None, bounds, False, (0.0, float("inf")), True, True)
    y, *wide = fk.ssd_scan(x, dt, A, B, C, *mamba)
    same, *narrow = fk.ssd_scan(x, dt, A, B, C, *mamba, torch.bfloat16)
    assert torch.equal(y, same) and y.dtype == torch.float32
    assert [t.dtype for t in wide] == [torch.float32] * 2
    assert all(torch.equal(a.bfloat16(), b) for a, b in zip(wide, narrow, strict=True))


def test_options_of_states_are_part_of_a_compiled_graph():
    x, dt, A, B, C = (t.float() for t in scan_arguments())
    seq_idx = torch.tensor([[0] * 23, [0] * 20 + [-1] * 3])

    def run(x):
        options = {"dt_limit": (0.1, 1.0), "return_final_states": True, "state_dtype": torch.float64}
        return fk.ssd_scan(x, dt, A, B, C, seq_idx=seq_idx, **options)

    torch.testing.assert_close(torch.compile(run, fullgraph=True, backend="aot_eager")(x), run(x))


WRONG = {
    "dt_limit": [1.0, None, (0.0,), (0.0, 1.0, 2.0), ("0", "1"), "01", (2.0, 1.0), (torch.nan, 1.0), (0.0, torch.nan),
                 (False, 1.0), (None, 1.0)],
    "chunk_size": [True, 0, -1, 2.0, "64", 2**63],
    "dt_softplus": [None, 1, "no"],
    "D": [1.0, torch.ones(3), torch.ones(2, 3, 1), torch.ones(())],
    "dt_bias": [1.0, torch.ones(3), torch.ones(2, dtype=torch.int64)],
}  # fmt: skip
WRONG_OF_SEQUENCES = WRONG | {
    "z": [True, torch.ones(1, 6, 2, 2)],
    "initial_states": [0, torch.ones(1, 2, 4, 3)],
    "seq_idx": [[0] * 6, torch.zeros(1, 6), torch.zeros(6, dtype=torch.int32), torch.zeros(1, 7, dtype=torch.int32)],
    "return_final_states": [None, 1, "yes"],
    "return_varlen_states": [None, 1, "yes"],
    "state_dtype": ["float32", torch.int32, 1],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name in WRONG for value in WRONG[name]])
def test_a_wrong_argument_of_an_image_is_named(name, value):
    x, dt, A, B, C = (t.float() for t in image_arguments())
    with pytest.raises((TypeError, ValueError), match=f"^{name}: expected[^\n]*$"):
        fk.ssd_scan_2d(**{"x": x, "dt": dt, "A": A, "B": B, "C": C} | {name: value})


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name in WRONG_OF_SEQUENCES for value in WRONG_OF_SEQUENCES[name]]
)
def test_a_wrong_argument_of_a_sequence_is_named(name, value):
    x, dt, A, B, C = (t.float() for t in scan_arguments(1, 6, 2, 3, 1, 4))
    with pytest.raises((TypeError, ValueError), match=f"^{name}: expected[^\n]*$"):
        fk.ssd_scan(**{"x": x, "dt": dt, "A": A, "B": B, "C": C} | {name: value})


@pytest.mark.parametrize("backend", EVERYWHERE)
@pytest.mark.parametrize("bounds", [[], [6], [0, 10], [0, 4, 2, 6], [-2, 6], [0.0, 6.0], [[0, 6]]])
def test_bounds_outside_the_row_are_refused(bounds, backend):
    x, dt, A, B, C = (t.float() for t in scan_arguments(1, 6, 2, 3, 1, 4))
    bounds = torch.tensor(bounds) if bounds else torch.tensor(bounds, dtype=torch.int64)
    with fk.use_backend(backend), pytest.raises((TypeError, ValueError), match=r"^cu_seqlens: expected"):
        fk.ssd_scan(x, dt, A, B, C, cu_seqlens=bounds, return_varlen_states=True)
