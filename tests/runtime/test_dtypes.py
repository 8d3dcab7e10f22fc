"""float32, bfloat16 and autocast; and what is refused, on every rank alike, with its numbers."""

import pytest
import torch
import torch.nn.functional as F

import sap_hf
from sap_hf.errors import LayoutError, SapError, TensorError
from tests.dist import run_ranks
from tests.runtime.parity import Case, inputs, join, judge, right_answer, run_case, run_cases

# float32: 24 bits of mantissa, sums of up to 100 terms of size 1 to 10; measured: 2e-6.
FLOAT32 = 1e-5

LONG = (70, 13, 1, 100, 16)
PLANS = [(strategy, layout) for strategy in ("sap", "all_gather") for layout in ("contiguous", "zigzag")]
IDS = ["-".join(plan) for plan in PLANS]


def single(strategy, layout):
    return Case(lengths=LONG, strategy=strategy, layout=layout, head_dim=16, value_dim=16, dtype="float32")


def half(strategy, layout):
    # As many kv heads as query heads: torch sums the gradients of a kv head in bfloat16, which would make the
    # plain result, and so the bound, needlessly loose. A long document, whose keys many ranks read.
    return Case(
        lengths=(300, 20),
        strategy=strategy,
        layout=layout,
        heads=2,
        head_dim=16,
        value_dim=16,
        dtype="bfloat16",
    )


@pytest.fixture(scope="module")
def answers():
    cases = [make(*plan) for make in (single, half) for plan in PLANS]
    return dict(zip(cases, zip(*run_ranks(run_cases, 4, cases, poison=True))))


@pytest.mark.parametrize("strategy, layout", PLANS, ids=IDS)
def test_float32_matches_documents_run_alone(answers, strategy, layout):
    case = single(strategy, layout)
    judge(case, 4, answers[case], FLOAT32)


def plain(case, world):
    """What one process computes in the dtype of the case: each document through torch's own attention."""
    given = inputs(case, world)
    total = sum(case.lengths)
    q, k, v = (tensor[:total].clone().requires_grad_() for tensor in (given.q, given.k, given.v))
    outs = []
    for q_part, k_part, v_part in zip(q.split(case.lengths), k.split(case.lengths), v.split(case.lengths)):
        heads_first = [tensor.transpose(0, 1)[None] for tensor in (q_part, k_part, v_part)]
        out = F.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True)
        outs.append(out[0].transpose(0, 1))
    out = torch.cat(outs)
    (out * given.dout[:total]).sum().backward()
    return {"out": out.detach(), "dq": q.grad, "dk": k.grad, "dv": v.grad}


@pytest.mark.parametrize("strategy, layout", PLANS, ids=IDS)
def test_bfloat16_is_at_most_twice_as_far_off_as_plain_bfloat16(answers, strategy, layout):
    case = half(strategy, layout)
    got, right, reference = join(case, answers[case]), right_answer(case, 4), plain(case, 4)
    total = sum(case.lengths)
    for name, expected in right.items():
        assert got[name].dtype == torch.bfloat16
        assert not got[name][total:].any()
        error = (got[name][:total].double() - expected).norm().item()
        allowed = 2 * (reference[name].double() - expected).norm().item()
        assert error <= allowed, f"{name}: {error:.3g} against {allowed:.3g} allowed"


@pytest.mark.parametrize("strategy, layout", PLANS, ids=IDS)
def test_gradients_are_accumulated_wider_than_they_travel(answers, strategy, layout):
    # One rounding of the result cannot be avoided, and what came from other ranks was rounded on the way. Summing
    # dK and dV in bfloat16 would be 1.7 times one rounding here.
    case = half(strategy, layout)
    got = join(case, answers[case])
    for name, expected in right_answer(case, 4).items():
        one_rounding = (expected.bfloat16().double() - expected).norm()
        assert (got[name][: sum(case.lengths)].double() - expected).norm() <= 1.5 * one_rounding, name


def under_autocast(rank, world):
    case = Case(lengths=LONG, dtype="float32")
    given = inputs(case, world)
    plan = case.plan(world)
    rows = torch.from_numpy(plan.rows(rank))
    # What a model has under autocast: float32 queries from a rotary embedding, bfloat16 values from a linear.
    q, k = (tensor[rows].clone().requires_grad_() for tensor in (given.q, given.k))
    v = given.v[rows].bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = sap_hf.attention(q, k, v, plan)
    (out.float() * given.dout[rows]).sum().backward()
    return {
        "rows": rows.numpy(),
        "out": out.detach().float(),
        "dq": q.grad,
        "dk": k.grad,
        "dv": v.grad.float(),
    }


def test_mixed_dtypes_work_under_autocast():
    case = Case(lengths=LONG, dtype="float32")
    got = join(case, run_ranks(under_autocast, 2, poison=True))
    right = right_answer(case, 2)
    total = sum(LONG)
    for name, expected in right.items():
        # One rounding to bfloat16 (8 bits) of each of q, k and v, and one of the result.
        assert (got[name][:total].double() - expected).norm() <= 0.02 * expected.norm(), name
    assert got["dq"].dtype == got["dk"].dtype == torch.float32


# ---- refusals ---------------------------------------------------------------------------------------


def refusals(rank, world):
    """By name: the error, or None, that this rank met."""
    case = Case(lengths=(5, 3, 8), dtype="float32")
    given = inputs(case, world)
    plan = case.plan(world)
    rows = torch.from_numpy(plan.rows(rank))
    q, k, v = (tensor[rows] for tensor in (given.q, given.k, given.v))
    asked = {
        "mixed": lambda: sap_hf.attention(q, k.double(), v, plan),
        "rows": lambda: sap_hf.attention(q[:-1], k[:-1], v[:-1], plan),
        "kv_rows": lambda: sap_hf.attention(q, k[:-1], v[:-1], plan),
        "heads": lambda: sap_hf.attention(q[:, :3], k, v, plan),
        "dimensions": lambda: sap_hf.attention(q[None], k[None], v[None], plan),
        "head_dim": lambda: sap_hf.attention(q, k[:, :, :-1], v, plan),
        "sinks": lambda: sap_hf.attention(q, k, v, plan, sinks=torch.zeros(case.heads + 1)),
        # Eight rows on each rank, as the tensors have, but of three ranks.
        "group": lambda: sap_hf.attention(q, k, v, sap_hf.plan(lengths=[24], cp_size=3)),
    }
    return {name: _error(call) for name, call in asked.items()}


def _error(call):
    try:
        call()
    except SapError as error:
        return type(error).__name__, str(error)
    return None


@pytest.fixture(scope="module")
def refused():
    return run_ranks(refusals, 2)


@pytest.mark.parametrize(
    "name, kinds, numbers",
    [
        ("mixed", (TensorError,), ("float32", "float64")),
        ("rows", (TensorError,), ("7", "8")),
        ("kv_rows", (TensorError,), ("7", "8")),
        ("heads", (TensorError, LayoutError), ("3", "2")),
        ("dimensions", (TensorError,), ("4",)),
        ("head_dim", (TensorError,), ("7", "8")),
        ("sinks", (TensorError,), ("5", "4")),
        ("group", (LayoutError,), ("2", "3")),
    ],
)
def test_what_does_not_fit_is_refused_on_every_rank_with_its_numbers(refused, name, kinds, numbers):
    for errors in refused:
        assert errors[name] is not None, "nothing was refused"
        kind, message = errors[name]
        assert kind in {each.__name__ for each in kinds}, message
        for number in numbers:
            assert number in message


def one_case_alone(rank, world):
    return run_case(rank, world, Case(lengths=(5, 3, 8)))


def test_two_runs_give_the_same_bits():
    first, second = (join(Case(lengths=(5, 3, 8)), run_ranks(one_case_alone, 3)) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name])
