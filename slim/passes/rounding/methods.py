"""PLACEHOLDER until the methods land."""

from typing import Literal
from slim.passes.rounding.grid import *
from slim.passes.rounding.scales import search, spanning
import torch

Method = Literal["rtn", "hqq", "gptq", "awq"]
with_data = frozenset({"gptq", "awq"})


def default_method(grid, data):
    return "rtn" if grid.format in ("int8", "fp8") else "gptq" if data else "hqq"


def round_weight(w, grid, method, st):
    flat = w.reshape(-1, w.shape[-1]).float()
    k = grid.groups(flat.shape[-1])
    kept = grid.scale_type(float(flat.abs().max()))
    if method == "rtn":
        sc = spanning(flat.unflatten(-1, (k, -1)), grid, kept)[0]
    else:
        sc = search(flat, grid, kept, None if st is None else st.gram.diag())
    z = None if sc.zero is None else spread(sc.zero, flat.shape[-1])
    steps = grid.nearest(flat / spread(sc.scale, flat.shape[-1]), z)
    n = grid.numbers(steps, z).view(w.shape)
    shape = (*w.shape[:-1], k) if grid.group_size else w.shape[:-1]
    return Rounded(grid, n, sc.scale.view(shape), None if sc.zero is None else sc.zero.to(torch.int8).view(shape))
