"""Attention backends against a naive softmax loop and against each other."""

import importlib
import itertools
import types
from importlib import metadata

import pytest
import torch
import torch.nn.functional as F
from flash_attn_signatures import FUNCTIONS, READ, signature, without_annotations

from speechbrain_jepa import attention
from speechbrain_jepa.attention import Rows, check_attention, choose_backend
from speechbrain_jepa.cpu import LONGEST_MATMUL_ROW

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
BF16_ROUNDOFF = 2.0**-8  # half the spacing of bfloat16, 8 significant bits, next to 1
HEADS = 3


def naive_attention(qkv: torch.Tensor, heads: int, valid=None) -> torch.Tensor:
    """softmax(q k / sqrt(d)) v, one clip, head and query at a time; padding gives zeros."""
    clips, length, width = qkv.shape
    dim = width // 3
    size = dim // heads
    rows = []
    for clip in range(clips):
        keys = [k for k in range(length) if valid is None or valid[clip, k]]
        for query in range(length):
            parts = []
            for head in range(heads):
                at = slice(head * size, (head + 1) * size)
                q = qkv[clip, query, :dim][at]
                k = qkv[clip, keys, dim : 2 * dim][:, at]
                v = qkv[clip, keys, 2 * dim :][:, at]
                scores = k @ q / size**0.5
                weights = (scores - scores.max()).exp()
                parts.append((weights / weights.sum()) @ v)
            row = torch.cat(parts)
            rows.append(row if query in keys else torch.zeros_like(row))
    return torch.stack(rows).unflatten(0, (clips, length))


def attend(backend: str, qkv: torch.Tensor, valid=None) -> torch.Tensor:
    """What one layer computes: pack, attend, unpack."""
    rows = Rows("sdpa", qkv, valid)
    rows.backend = backend
    return rows.unpack(rows.attend(rows.pack(qkv), HEADS))


def example(clips=4, length=7, dim=24, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(clips, length, 3 * dim, generator=generator, dtype=torch.float64)
    grad = torch.randn(clips, length, dim, generator=generator, dtype=torch.float64)
    return qkv.to(device, dtype).requires_grad_(), grad.to(device, dtype)


def lengths_to_valid(*lengths, width=7):
    return torch.arange(width) < torch.tensor(lengths)[:, None]


VALID = {"full": None, "ragged": lengths_to_valid(7, 1, 4, 5)}
ragged_or_not = pytest.mark.parametrize("valid", VALID.values(), ids=VALID.keys())


def value_and_gradient(function, qkv, grad):
    out = function(qkv)
    return out.detach(), torch.autograd.grad(out, qkv, grad)[0]


def naive_in_double(qkv, grad, valid):
    qkv = qkv.detach().double().cpu().requires_grad_()
    grad = grad.detach().double().cpu()
    return value_and_gradient(lambda x: naive_attention(x, HEADS, valid), qkv, grad)


def relative_error(ours, theirs):
    """Of the Euclidean norm."""
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()


@pytest.mark.parametrize("backend", ["sdpa", "matmul"])
@ragged_or_not
def test_backends_equal_a_naive_softmax_loop_in_float32(backend, valid):
    qkv, grad = example()
    ours = value_and_gradient(lambda x: attend(backend, x, valid), qkv, grad)
    theirs = naive_in_double(qkv, grad, valid)
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our.double(), their, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("valid", [None, VALID["ragged"]], ids=["full", "ragged"])
def test_other_tokens_attend_alike_through_flash_attn_sdpa_and_by_hand(stand_in, valid):
    qkv, _ = example()
    dim = qkv.shape[-1] // 3
    queries, keys_values = torch.randn(len(qkv), 5, dim), qkv[..., dim:]

    def attended(backend):
        rows = Rows(backend, keys_values, valid)
        rows.backend = backend
        return rows.attend_from(queries, rows.pack(keys_values), HEADS)

    ours = attended("flash_attn")
    assert stand_in == ["flash_attn_func" if valid is None else "flash_attn_varlen_func"]
    for row in range(len(qkv)):
        own = keys_values[row] if valid is None else keys_values[row, valid[row]]
        q = queries[row].unflatten(-1, (HEADS, -1)).transpose(0, 1)
        k, v = own.unflatten(-1, (2, HEADS, -1)).permute(1, 2, 0, 3)
        weights = (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).softmax(-1)
        expected = (weights @ v).transpose(0, 1).flatten(-2)
        torch.testing.assert_close(ours[row], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("length", [7, 70])  # each side of SHORTEST_HALF_SOFTMAX_ROW
@pytest.mark.parametrize("backend", ["sdpa", "matmul"])
@ragged_or_not
def test_backends_equal_a_naive_softmax_loop_in_bfloat16(backend, valid, length):
    """Scores, weights, output and their gradients are each rounded to bfloat16.

    A score s is off by up to 2 |s| u, its weight by as much relatively, plus u for itself and u for
    the output: with |s| around 1, about 4 u. A gradient passes through twice as many roundings.
    """
    qkv, grad = example(length=length, dtype=torch.bfloat16)
    valid = None if valid is None else lengths_to_valid(length, 1, 4, 5, width=length)
    ours = value_and_gradient(lambda x: attend(backend, x, valid), qkv, grad)
    theirs = naive_in_double(qkv, grad, valid)
    assert ours[0].dtype == torch.bfloat16
    assert relative_error(ours[0], theirs[0]) < 4 * BF16_ROUNDOFF
    assert relative_error(ours[1], theirs[1]) < 8 * BF16_ROUNDOFF


@ragged_or_not
def test_matmul_and_sdpa_agree_at_the_sizes_of_the_paper(valid):
    """12 heads of 64 and 65 patches, float32."""
    generator = torch.Generator().manual_seed(1)
    qkv = torch.randn(4, 65, 3 * 768, generator=generator).requires_grad_()
    grad = torch.randn(4, 65, 768, generator=generator)
    valid = None if valid is None else lengths_to_valid(65, 3, 26, 40, width=65)
    results = []
    for backend in ("sdpa", "matmul"):
        rows = Rows("sdpa", qkv, valid)
        rows.backend = backend
        results.append(
            value_and_gradient(lambda x, rows=rows: rows.unpack(rows.attend(x, 12)), qkv, grad)
        )
    for first, second in zip(*results, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-5)


@ragged_or_not
def test_matmul_gradient_equals_finite_differences(valid):
    qkv, _ = example(clips=2, length=4, dim=6, dtype=torch.float64)
    valid = None if valid is None else lengths_to_valid(4, 2, width=4)
    assert torch.autograd.gradcheck(lambda x: attend("matmul", x, valid), (qkv,))


@pytest.mark.parametrize("backend", ["sdpa", "matmul"])
@pytest.mark.parametrize("rubbish", [1e4, -1e4])
def test_padding_reaches_neither_values_nor_gradients(backend, rubbish):
    valid = VALID["ragged"]
    qkv, grad = example()
    expected = value_and_gradient(lambda x: attend(backend, x, valid), qkv, grad)
    dirty = qkv.detach().masked_fill(~valid[..., None], rubbish).requires_grad_()
    ours = value_and_gradient(lambda x: attend(backend, x, valid), dirty, grad)
    assert torch.equal(ours[0], expected[0])
    assert torch.equal(ours[1][valid], expected[1][valid])
    assert ours[0][~valid].count_nonzero() == 0
    assert ours[1][~valid].count_nonzero() == 0


@pytest.mark.parametrize("backend", ["sdpa", "matmul"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_without_a_valid_token_is_zero_and_leaves_the_others_alone(backend, dtype):
    valid = lengths_to_valid(7, 0, 4, 5)
    qkv, grad = example(dtype=dtype)
    out, gradient = value_and_gradient(lambda x: attend(backend, x, valid), qkv, grad)
    assert out.isfinite().all() and gradient.isfinite().all()
    assert out[1].count_nonzero() == 0 and gradient[1].count_nonzero() == 0
    others = [0, 2, 3]
    alone, _ = value_and_gradient(
        lambda x: attend(backend, x, valid[others]),
        qkv.detach()[others].requires_grad_(),
        grad[others],
    )
    torch.testing.assert_close(out[others], alone)


@pytest.mark.parametrize("backend", ["sdpa", "matmul"])
def test_validity_need_not_be_a_prefix(backend):
    """The predictor joins two ragged parts: padding lies in the middle of its rows."""
    valid = lengths_to_valid(7, 1, 4, 5)[:, [3, 0, 6, 1, 5, 2, 4]]
    qkv, grad = example()
    ours = value_and_gradient(lambda x: attend(backend, x, valid), qkv, grad)
    for our, their in zip(ours, naive_in_double(qkv, grad, valid), strict=True):
        torch.testing.assert_close(our.double(), their, rtol=1e-5, atol=1e-5)


# --- the choice -------------------------------------------------------------------------------

HALVES = (torch.float16, torch.bfloat16)
TABLE = [
    # attention, device, dtype, row length, flash-attn installed -> backend
    *[("sdpa", device, dtype, 65, there, "sdpa")
      for device in (CPU, CUDA) for dtype in (torch.float32, *HALVES) for there in (True, False)],
    *[("auto", CUDA, dtype, 65, True, "flash_attn") for dtype in HALVES],
    *[("auto", CUDA, dtype, 65, False, "sdpa") for dtype in HALVES],
    *[("auto", CUDA, torch.float32, 65, there, "sdpa") for there in (True, False)],
    *[("auto", CPU, torch.float32, 65, there, "sdpa") for there in (True, False)],
    *[("auto", CPU, dtype, LONGEST_MATMUL_ROW, True, "matmul") for dtype in HALVES],
    *[("auto", CPU, dtype, LONGEST_MATMUL_ROW + 1, True, "sdpa") for dtype in HALVES],
    *[("flash_attn", CUDA, dtype, 65, True, "flash_attn") for dtype in HALVES],
]  # fmt: skip


@pytest.mark.parametrize(("choice", "device", "dtype", "length", "there", "expected"), TABLE)
def test_the_backend_follows_choice_device_dtype_and_what_is_installed(
    monkeypatch, choice, device, dtype, length, there, expected
):
    module = types.ModuleType("flash_attn.flash_attn_interface") if there else None
    monkeypatch.setattr(attention, "_flash_attn_module", lambda: module)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert choose_backend(choice, device, dtype, row_length=length) == expected


FLASH_2, CUTE = attention.FLASH_ATTN
CAPABILITIES = [(FLASH_2, (7, 5), False), (FLASH_2, (8, 0), True), (FLASH_2, (9, 0), True),
                (CUTE, (8, 0), False), (CUTE, (8, 9), False), (CUTE, (9, 0), True),
                (CUTE, (10, 0), True)]  # fmt: skip


@pytest.mark.parametrize(("name", "capability", "can_train"), CAPABILITIES)
def test_flash_attn_serves_only_gpus_that_it_has_a_backward_pass_for(
    monkeypatch, name, capability, can_train
):
    asked = []
    monkeypatch.setattr(attention, "_flash_attn_module", lambda: types.ModuleType(name))
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda device: asked.append(device) or capability
    )
    device = torch.device("cuda:1")
    backend = choose_backend("auto", device, torch.bfloat16)
    assert backend == ("flash_attn" if can_train else "sdpa")
    assert asked == [device]  # of several GPUs, the one in use
    if can_train:
        assert choose_backend("flash_attn", device, torch.bfloat16) == "flash_attn"
    else:
        has = ".".join(map(str, capability))
        with pytest.raises(ValueError, match=f"{name} has no backward .* cuda:1 has {has}: .*auto"):
            choose_backend("flash_attn", device, torch.bfloat16)


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize(
    ("device", "dtype"), [(CPU, torch.bfloat16), (CPU, torch.float32), (CUDA, torch.float32)]
)
def test_asking_for_flash_attn_where_it_cannot_run_is_a_clear_error(
    monkeypatch, there, device, dtype
):
    module = types.ModuleType("flash_attn.flash_attn_interface") if there else None
    monkeypatch.setattr(attention, "_flash_attn_module", lambda: module)
    with pytest.raises(ValueError, match=f"half precision on a CUDA device, got {dtype} on"):
        choose_backend("flash_attn", device, dtype, row_length=65)
    if device == CPU:
        with pytest.raises(ValueError, match="attention=auto"):
            Rows("flash_attn", torch.zeros(1, 2, 3, dtype=dtype))


def test_asking_for_flash_attn_that_is_not_installed_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(attention, "_flash_attn_module", lambda: None)
    install = "not installed: pip install --no-build-isolation flash-attn"
    with pytest.raises(ValueError, match=install):
        choose_backend("flash_attn", CUDA, torch.bfloat16, row_length=65)


@pytest.mark.parametrize("wrong", ["flash", "FLASH_ATTN", "matmul", "", None])
def test_an_unknown_choice_is_refused_with_the_choices(wrong):
    with pytest.raises(ValueError, match="auto, flash_attn, sdpa"):
        check_attention(wrong)


# --- flash-attn -------------------------------------------------------------------------------


def stand_in_for(module: str, calls: list):
    """The two functions as the package has them (flash_attn_signatures), naive attention inside.

    A call binds to the package's own signature, or fails as it would there. `calls` takes the name
    of every function called.
    """

    def attend(q, k, v):
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    def attend_packed(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k):
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
        assert cu_seqlens_q[0] == cu_seqlens_k[0] == 0 and cu_seqlens_q[-1] == len(q)
        assert cu_seqlens_k[-1] == len(k) == len(v)
        assert type(max_seqlen_q) is type(max_seqlen_k) is int  # of the host: no synchronisation
        assert cu_seqlens_q.diff().max() <= max_seqlen_q
        assert cu_seqlens_k.diff().max() <= max_seqlen_k
        rows = []
        bounds = zip(itertools.pairwise(cu_seqlens_q), itertools.pairwise(cu_seqlens_k))
        for (start, end), (first, last) in bounds:
            row = (q[None, start:end], k[None, first:last], v[None, first:last])
            rows.append(attend(*row)[0])
        return torch.cat(rows)

    def by_the_signature(name, compute):
        def function(*args, **kwargs):
            calls.append(name)
            given = signature(module, name).bind(*args, **kwargs).arguments
            out = compute(**given)  # what it does not know is a feature that nobody asked for
            return (out, None) if READ[module]["returns"] == "out, lse" else out

        return function

    computes = {"flash_attn_func": attend, "flash_attn_varlen_func": attend_packed}
    assert computes.keys() == set(FUNCTIONS)
    functions = {n: by_the_signature(n, f) for n, f in computes.items()}
    return types.SimpleNamespace(**functions)


@pytest.fixture(params=READ)
def stand_in(request, monkeypatch):
    """Rows that take flash-attn's path on a CPU; gives the names of the functions called."""
    calls = []
    module = stand_in_for(request.param, calls)
    monkeypatch.setattr(attention, "_flash_attn_module", lambda: module)
    monkeypatch.setattr(attention, "choose_backend", lambda *_, **__: "flash_attn")
    return calls


@pytest.mark.parametrize(
    "valid",
    [
        None,
        VALID["ragged"],
        VALID["ragged"][:, [3, 0, 6, 1, 5, 2, 4]],
        lengths_to_valid(7, 0, 4, 5),
    ],
    ids=["full", "ragged", "padding in the middle", "an empty row"],
)
def test_packing_for_flash_attn_equals_sdpa(stand_in, valid):
    """Rows are packed end to end, attended, and unpacked: checked with a stand-in on any device."""
    qkv, grad = example()

    def flash(x):
        rows = Rows("flash_attn", x, valid)
        assert rows.packed == (valid is not None)
        packed = rows.pack(x)
        if valid is not None:
            assert packed.shape == (valid.sum(), x.shape[-1])
        return rows.unpack(rows.attend(packed, HEADS))

    ours = value_and_gradient(flash, qkv, grad)
    assert stand_in == ["flash_attn_func" if valid is None else "flash_attn_varlen_func"]
    if valid is not None and not valid.any(1).all():
        assert ours[0][1].count_nonzero() == ours[1][1].count_nonzero() == 0
        keep = valid.any(1)
        theirs = naive_in_double(qkv[keep], grad[keep], valid[keep])
        ours = [part[keep] for part in ours]
    else:
        theirs = naive_in_double(qkv, grad, valid)
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our.double(), their, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("module", READ)
def test_the_installed_flash_attn_has_the_signatures_that_its_stand_in_has(module):
    """Of the versions that were read; of a newer one, the calls must bind to what it has."""
    try:
        installed = importlib.import_module(module)
        version = metadata.version(READ[module]["package"])
    except ImportError:
        pytest.skip(f"{READ[module]['package']} is not installed: signatures not compared")
    places = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
    for name, keywords in {"flash_attn_func": (), "flash_attn_varlen_func": places}.items():
        found = without_annotations(getattr(installed, name))
        if version in READ[module]["versions"]:
            assert found == signature(module, name)
        found.bind("q", "k", "v", **dict.fromkeys(keywords))


def why_no_flash_attn() -> str:
    if not torch.cuda.is_available():
        return "no CUDA device: flash-attn not compared"
    if attention._flash_attn_module() is None:
        return "flash-attn is not installed: not compared"
    return ""


@pytest.mark.skipif(bool(why_no_flash_attn()), reason=why_no_flash_attn() or "flash-attn is here")
@pytest.mark.parametrize("dtype", HALVES)
@ragged_or_not
def test_flash_attn_equals_a_naive_softmax_loop(dtype, valid):
    qkv, grad = example(dim=3 * 32, dtype=dtype, device="cuda")  # 32 dims a head: the predictor's
    on_device = None if valid is None else valid.cuda()

    def flash(x):
        rows = Rows("flash_attn", x, on_device)
        return rows.unpack(rows.attend(rows.pack(x), HEADS))

    ours = value_and_gradient(flash, qkv, grad)
    theirs = naive_in_double(qkv, grad, valid)
    assert relative_error(ours[0].cpu(), theirs[0]) < 4 * BF16_ROUNDOFF
    assert relative_error(ours[1].cpu(), theirs[1]) < 8 * BF16_ROUNDOFF


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: sdpa on it not compared")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@ragged_or_not
def test_sdpa_on_cuda_equals_a_naive_softmax_loop(dtype, valid):
    qkv, grad = example(dtype=dtype, device="cuda")
    on_device = None if valid is None else valid.cuda()
    ours = value_and_gradient(lambda x: attend("sdpa", x, on_device), qkv, grad)
    theirs = naive_in_double(qkv, grad, valid)
    limit = BF16_ROUNDOFF if dtype == torch.bfloat16 else 1e-6  # TF32 is off by default
    assert relative_error(ours[0].cpu(), theirs[0]) < 4 * limit
    assert relative_error(ours[1].cpu(), theirs[1]) < 8 * limit
