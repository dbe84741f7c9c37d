"""Checks of arguments that the ops share."""

import pytest
import torch

from ijepa_kernels import add_layer_norm, gather_tokens, latent_loss
from ijepa_kernels._checks import check_range, debug_checks, debugging


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
