"""Attention by examples equals attention with the dense mask, which need not exist."""

import copy
import pickle

import pytest
import torch
from torch.nn import functional as F

from lightning_peft.engine.training.packed_attention import (
    PackedMask,
    attend_one_by_one,
    plan_batches,
)

# Two rows; examples of like length, one alone, one in blocks of queries, and one token.
LENGTHS = [[300, 40, 31, 1], [35, 200, 37, 100]]


def heads(dtype=torch.float64, width=8):
    generator = torch.Generator().manual_seed(0)
    shape = (len(LENGTHS), 3, sum(LENGTHS[0]), width)
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for _ in range(3)]


def reference_mask(lengths):
    rows = []
    for row in lengths:
        blocks = [torch.ones(n, n, dtype=torch.bool).tril() for n in row]
        rows.append(torch.block_diag(*blocks)[None])
    return torch.where(torch.stack(rows).bool(), 0.0, float("-inf"))


def attended(attend):
    """Returns the output, and the gradients of queries, keys and values."""
    given = heads()
    out = attend(*given)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    return [out, *torch.autograd.grad(out, given, weights)]


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("way", ["batches", "one by one"])
def test_output_and_gradients_are_those_with_the_dense_mask(way, scale):
    mask, dense = PackedMask(LENGTHS), reference_mask(LENGTHS).double()

    def by_examples(q, k, v):
        if way == "one by one":
            return attend_one_by_one(q, k, v, LENGTHS, 8**-0.5 if scale is None else scale)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)

    def with_mask(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=dense, scale=scale)

    for found, expected in zip(attended(by_examples), attended(with_mask), strict=True):
        assert expected.abs().max() > 0.1
        torch.testing.assert_close(found, expected)
    assert mask._dense is None


def test_in_bfloat16_it_is_as_near_to_the_truth_as_torch_is():
    exact = attended(lambda *given: F.scaled_dot_product_attention(
        *given, attn_mask=reference_mask(LENGTHS).double()
    ))[0]  # fmt: skip
    given = heads(torch.bfloat16)
    ours = F.scaled_dot_product_attention(*given, attn_mask=PackedMask(LENGTHS, torch.bfloat16))
    dense = reference_mask(LENGTHS).bfloat16()
    theirs = F.scaled_dot_product_attention(*given, attn_mask=dense)
    assert ours.dtype == torch.bfloat16
    errors = [float((out.double() - exact).norm().detach()) for out in (ours, theirs)]
    assert 0 < errors[0] < 1.2 * errors[1]


def test_autocast_decides_the_dtype_of_the_products():
    given = heads(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = F.scaled_dot_product_attention(*given, attn_mask=PackedMask(LENGTHS))
        out.float().sum().backward()
    assert out.dtype == torch.bfloat16
    assert {x.grad.dtype for x in given} == {torch.float32}


@pytest.mark.parametrize("option", [{"dropout_p": 0.5}, {"enable_gqa": True}])
def test_what_it_does_not_cover_gets_the_dense_mask(option):
    q, k, v = heads(torch.float32)
    if "enable_gqa" in option:
        k, v = k[:, :1], v[:, :1]
    mask, found = PackedMask(LENGTHS), []
    for attn_mask in (mask, reference_mask(LENGTHS)):
        torch.manual_seed(0)
        found.append(F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, **option))
    torch.testing.assert_close(*found)
    assert mask._dense is not None


def test_values_are_there_for_whoever_looks():
    mask = PackedMask([[2, 1]])
    expected = reference_mask([[2, 1]])
    assert torch.equal(mask + 0, expected)
    assert torch.equal(mask[:, :, :, :2], expected[:, :, :, :2])
    assert (mask.shape, mask.ndim, mask.dtype) == (expected.shape, 4, torch.float32)


@pytest.mark.parametrize("send", [lambda m: pickle.loads(pickle.dumps(m)), copy.deepcopy])
def test_it_travels_and_changes_dtype_without_values(send):
    mask = PackedMask([[2, 1]])
    sent = send(mask.to("cpu", torch.bfloat16))
    assert type(sent) is PackedMask
    assert (sent.lengths, sent.dtype) == ([[2, 1]], torch.bfloat16)
    assert sent.double().dtype == torch.float64
    assert mask._dense is None


def test_every_token_is_in_one_batch_of_like_lengths():
    batches = plan_batches(LENGTHS)
    places = torch.cat([batch.tokens[batch.slots] for batch in batches])
    assert places.sort().values.tolist() == list(range(2 * sum(LENGTHS[0])))
    assert [batch.lengths for batch in batches] == [[300], [200], [100], [40, 37, 35, 31], [1]]
