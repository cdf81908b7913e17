"""The same operations in PyTorch, as a PyTorch user has them on a CPU. Import it only where torch is installed.

softmax is torch's own fused attention; the forget gate enters it as an additive bias, the only way there. cosFormer is
the paper's causal form, a cumulative sum of outer products. LSSAR and tropical attention are the papers' dense
formulas; tropical in blocks of rows, each recomputed in the backward pass, since [T, S, D] at once would not fit.
"""

import math

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

TROPICAL_ROWS = 16


def torch_form(operation: str):
    """function(q, k, v, ...) -> o of torch tensors [B, T, H, D]."""
    return {
        "softmax": softmax,
        "forgetting": forgetting,
        "cosformer": cosformer,
        "lssar": lssar,
        "tropical": tropical,
    }[operation]


def softmax(q, k, v):
    return _fused(q, k, v, is_causal=True)


def forgetting(q, k, v, log_f):
    c = log_f.transpose(1, 2).cumsum(-1)
    bias = (c[..., :, None] - c[..., None, :]).masked_fill(_future(q.shape[1]), -torch.inf)
    return _fused(q, k, v, attn_mask=bias)


def cosformer(q, k, v):
    T = q.shape[1]
    angle = (math.pi / 2 / T) * torch.arange(1, T + 1, dtype=q.dtype)[:, None, None]
    q, k = (torch.cat([x.relu() * angle.cos(), x.relu() * angle.sin()], -1) for x in (q, k))
    sums = torch.einsum("bthd,bthe->bthde", k, v).cumsum(1)
    den = torch.einsum("bthd,bthd->bth", q, k.cumsum(1)).clamp_min(1e-6)
    return torch.einsum("bthd,bthde->bthe", q, sums) / den[..., None]


def lssar(q, k, v, power=15.0):
    (_, T, _, D), future = q.shape, _future(q.shape[1])
    n = torch.arange(1, T + 1, dtype=q.dtype)[:, None]
    scores = math.log(D) * n.log() * torch.einsum("bthd,bshd->bhts", q, k)
    a = F.softplus(scores).masked_fill(future, 0)
    P = a / a.sum(-1, keepdim=True)
    excess = (n * P - (n > 3).to(q.dtype)).clamp_min(0).masked_fill(future, 0)
    w = (excess / excess.amax(-1, keepdim=True).clamp_min(1e-30)) ** power
    return torch.einsum("bhts,bshd->bthd", w / w.sum(-1, keepdim=True).clamp_min(1e-30), v)


def tropical(q, k, v):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    tops = range(0, q.shape[2], TROPICAL_ROWS)
    rows = [checkpoint(_tropical_rows, q, k, v, top, use_reentrant=False) for top in tops]
    return torch.expm1(torch.cat(rows, 2)).transpose(1, 2)


def _tropical_rows(q, k, v, top):
    end = min(top + TROPICAL_ROWS, q.shape[2])
    difference = q[:, :, top:end, None] - k[:, :, None, :end]
    score = difference.amin(-1) - difference.amax(-1)
    score = score.masked_fill(torch.arange(end) > torch.arange(top, end)[:, None], -torch.inf)
    return (score[..., None] + v[:, :, None, :end]).max(-2).values


def _fused(q, k, v, **mask):
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), **mask).transpose(1, 2)


def _future(T):
    return torch.ones(T, T, dtype=torch.bool).triu(1)
