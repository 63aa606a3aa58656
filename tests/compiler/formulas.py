"""What each op of the dialect means, written a second time: in float64, from the papers, with no slim code."""

from __future__ import annotations

import torch
from torch import Tensor


def seen(
    batch: int, queries: int, keys: int, *, causal: bool, window: int | None, key_mask: Tensor | None, offset: int = 0
) -> Tensor:
    """bool [batch, queries, keys], pair by pair."""
    table = torch.zeros(batch, queries, keys, dtype=torch.bool)
    for b in range(batch):
        for i in range(queries):
            for j in range(keys):
                behind = offset + i - j
                visible = behind >= 0 or not causal
                visible &= window is None or (behind < window and (causal or -behind < window))
                table[b, i, j] = visible and (key_mask is None or bool(key_mask[b, j]))
    return table


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    slopes: Tensor | None = None,
    *,
    scale: float,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    offset: int = 0,
    layer: int = 0,
) -> Tensor:
    """softmax over the visible keys (and a sink, which takes weight and gives nothing); zeros where none is visible."""
    share = q.shape[1] // k.shape[1]
    heads = []
    visible = seen(q.shape[0], q.shape[2], k.shape[2], causal=causal, window=window, key_mask=key_mask, offset=offset)
    for h in range(q.shape[1]):
        scores = torch.einsum("bsd,btd->bst", q[:, h].double(), k[:, h // share].double()) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if bias is not None and bias.dtype != torch.bool:
            scores = scores + bias.double().expand(q.shape[0], q.shape[1], *scores.shape[1:])[:, h]
        if slopes is not None:
            row = torch.arange(offset, offset + q.shape[2])[:, None]
            scores = scores + slopes[h].double() * (torch.arange(k.shape[2])[None] - row)
        allowed = visible
        if bias is not None and bias.dtype == torch.bool:
            allowed = allowed & bias.expand(q.shape[0], q.shape[1], *scores.shape[1:])[:, h]
        weights = torch.exp(scores - scores.detach().amax(-1, keepdim=True)) * allowed
        total = weights.sum(-1, keepdim=True)
        if sinks is not None:
            total = total + torch.exp(sinks[h].double() - scores.detach().amax(-1, keepdim=True))
        weights = torch.where(total > 0, weights / total.clamp_min(1e-300), 0.0)
        heads.append(torch.einsum("bst,bte->bse", weights, v[:, h // share].double()))
    return torch.stack(heads, 1)


def rms_norm(x: Tensor, weight: Tensor | None, *, eps: float, offset: float = 0.0) -> Tensor:
    wide = x.double()
    y = wide / (wide.square().sum(-1, keepdim=True) / x.shape[-1] + eps).sqrt()
    return y if weight is None else y * (weight.double() + offset)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, *, eps: float, offset: float = 0.0) -> Tensor:
    wide = x.double()
    centred = wide - wide.sum(-1, keepdim=True) / x.shape[-1]
    y = centred / (centred.square().sum(-1, keepdim=True) / x.shape[-1] + eps).sqrt()
    y = y if weight is None else y * (weight.double() + offset)
    return y if bias is None else y + bias.double()


def rope(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """A pair of channels is a complex number, and is multiplied by cos + i sin."""
    half = cos.shape[-1]
    turned, kept = x.double()[..., : 2 * half], x.double()[..., 2 * half :]
    pairs = turned.unflatten(-1, (half, 2) if interleaved else (2, half))
    pairs = pairs if interleaved else pairs.transpose(-1, -2)
    turn = torch.complex(cos.double(), sin.double())[:, None]
    product = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turn)
    product = product if interleaved else product.transpose(-1, -2)
    return torch.cat([product.flatten(-2), kept], -1)


def grid(scale: Tensor, shape: torch.Size, axis: int | None, group_size: int | None) -> Tensor:
    """The scale of every element, looked up one by one."""
    full = torch.empty(shape, dtype=torch.float64)
    for index in torch.cartesian_prod(*(torch.arange(n) for n in shape)).reshape(-1, len(shape)).tolist():
        if axis is None:
            place: tuple[int, ...] = ()
        elif group_size is not None:
            place = tuple(i // group_size if d == axis else i for d, i in enumerate(index))
        elif scale.dim() > 1:
            place = tuple(index[: axis + 1])
        else:
            place = (index[axis],)
        full[tuple(index)] = scale[place].double()
    return full


def expert_linear(x: Tensor, weight: Tensor, bias: Tensor | None, expert: Tensor) -> Tensor:
    rows = [weight[e].double() @ row.double() for row, e in zip(x, expert.tolist(), strict=True)]
    out = torch.stack(rows) if rows else x.new_zeros(0, weight.shape[1]).double()
    return out if bias is None else out + bias.double()[expert]
