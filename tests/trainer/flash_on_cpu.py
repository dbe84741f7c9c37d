"""PyTorch's variable-length flash op for CPU tensors, so that its callers can run here."""

import contextlib
import itertools

import torch

__all__ = ["flash_on_cpu"]


def _forward(q, k, v, starts_q, starts_k, max_q, max_k, dropout, causal, debug):
    assert (dropout, causal, debug) == (0.0, False, False)
    assert starts_q.dtype == starts_k.dtype == torch.int32
    assert starts_q.diff().max() <= max_q
    assert starts_k.diff().max() <= max_k
    outs, sums = [], []
    for a, b in _slices(starts_q, starts_k):
        wide = (t.transpose(0, 1).to(_wide(t)) for t in (q[a], k[b], v[b]))
        own, keys, values = wide
        scores = own @ keys.mT * q.shape[-1] ** -0.5
        sums.append(scores.logsumexp(-1))
        outs.append((scores.softmax(-1) @ values).transpose(0, 1))
    out = torch.cat(outs).to(q.dtype).contiguous()
    unused = torch.empty(0, dtype=torch.uint64)
    seed = torch.empty(2, dtype=torch.uint64)
    return out, torch.cat(sums, 1).to(_wide(q)), seed, unused, q.new_empty(0)


def _backward(grad, q, k, v, out, lse, starts_q, starts_k, *rest):
    assert lse.shape == (q.shape[1], q.shape[0])
    assert rest[-2].dtype == torch.uint64
    dq, dk, dv = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
    scale = q.shape[-1] ** -0.5
    for a, b in _slices(starts_q, starts_k):
        wide = (t.transpose(0, 1).to(_wide(t)) for t in (q[a], k[b], v[b], out[a], grad[a]))
        own, keys, values, mixed, d = wide
        weights = (own @ keys.mT * scale - lse[:, a, None]).exp()
        inner = weights * (d @ values.mT - (d * mixed).sum(-1, keepdim=True)) * scale
        dv[b] = (weights.mT @ d).transpose(0, 1).to(v.dtype)
        dq[a] = (inner @ keys).transpose(0, 1).to(q.dtype)
        dk[b] = (inner.mT @ own).transpose(0, 1).to(k.dtype)
    return dq, dk, dv


def _slices(starts_q, starts_k):
    pairs = (itertools.pairwise(s) for s in (starts_q.tolist(), starts_k.tolist()))
    return [(slice(*a), slice(*b)) for a, b in zip(*pairs, strict=True)]


def _wide(tensor):
    return torch.promote_types(tensor.dtype, torch.float32)


@contextlib.contextmanager
def flash_on_cpu():
    """While it lasts, ``aten::_flash_attention_forward`` and ``_backward`` take CPU tensors."""
    library = torch.library.Library("aten", "IMPL")
    library.impl("_flash_attention_forward", _forward, "CPU")
    library.impl("_flash_attention_backward", _backward, "CPU")
    try:
        yield
    finally:
        library._destroy()
