"""Checks of arguments that the ops share, and the rule for errors."""

import pytest
import torch

from ijepa_kernels import add_layer_norm, gather_tokens, latent_loss
from ijepa_kernels._checks import check_range, debug_checks, debugging
from ijepa_kernels.testing import assert_not_worse


def test_the_first_index_out_of_range_is_named():
    index = torch.tensor([[0, 4], [5, -1]], dtype=torch.int32)
    message = r"rows must lie in 0 \.\. 4, got 5 at position 2 of 4"
    with pytest.raises(ValueError, match=message):
        check_range("rows", index, 5)
    with pytest.raises(ValueError, match=r"got -1 at position 3"):
        check_range("rows", index, 6)
    check_range("rows", index.abs(), 6)


def test_sizes_past_int32():
    """A size that the index's dtype cannot hold excludes nothing."""
    index = torch.tensor([0, 2**31 - 1], dtype=torch.int32)
    check_range("rows", index, 2**31)
    check_range("rows", index, 2**40)
    with pytest.raises(ValueError, match="got 2147483647 at position 1"):
        check_range("rows", index, 2**31 - 1)


def test_debug_checks_nest_and_end_with_errors():
    def fail():
        with debug_checks():
            with debug_checks():
                assert debugging()
            assert debugging()
            raise RuntimeError("within")

    assert not debugging()
    with pytest.raises(RuntimeError, match="within"):
        fail()
    assert not debugging()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("truth", [0.0, 1.0])
def test_an_error_may_be_an_ulp_of_the_terms_that_cancel(dtype, truth):
    """In units of float32, whatever the dtype of the result; and no more than that."""
    truth, terms = torch.full((4,), truth).double(), torch.full((4,), 1e6).double()
    plain, noise = truth.to(dtype), 1e6 * 2**-23
    near, far = ((truth + share * noise).to(dtype) for share in (0.9, 1.1))
    assert_not_worse("near", near, plain, truth, terms=terms)
    with pytest.raises(AssertionError, match="far: error"):
        assert_not_worse("far", far, plain, truth, terms=terms)
    with pytest.raises(AssertionError, match="near: error"):
        assert_not_worse("near", near, plain, truth)


def test_what_is_no_tensor_is_named():
    x, index = torch.zeros(3, 4), torch.zeros(2, dtype=torch.int32)
    with pytest.raises(ValueError, match="index must be a tensor, got list"):
        gather_tokens(x, [0, 1])
    with pytest.raises(ValueError, match="x must be a tensor, got list"):
        gather_tokens([0.0], index)
    with pytest.raises(ValueError, match="weight must be a tensor, got NoneType"):
        add_layer_norm(x, x, None, None)
    with pytest.raises(ValueError, match="prediction must be a tensor, got float"):
        latent_loss(1.0, x, index)


def test_forward_mode_is_refused():
    """torch's own registration would give tangents of zero."""
    x, index = torch.randn(3, 4), torch.zeros(2, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="gather_tokens has no forward-mode derivative"):
        torch.func.jvp(lambda x: gather_tokens(x, index), (x,), (torch.ones_like(x),))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(RuntimeError, match="add_layer_norm has no forward-mode derivative"):
            add_layer_norm(dual, x, x[0], x[0])
        assert torch.equal(gather_tokens(x, index), x[:1].expand(2, -1))
