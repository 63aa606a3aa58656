"""How a slim op enters torch: a schema, an eager reference that IS its meaning, a shape function, autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = torch.library.Library("slim", "DEF")
_REFERENCES: dict[str, Callable[..., Any]] = {}


def reference_of(op: Any) -> Callable[..., Any] | None:
    """The eager reference of a slim op, which can be differentiated as often as its steps can; None of other ops."""
    return _REFERENCES.get(op.name()) if isinstance(op, torch._ops.OpOverload) else None


def define(
    schema: str, reference: Callable[..., Any], fake: Callable[..., Any], *, differentiable: bool = True
) -> None:
    """Registers ``slim::<schema>``.

    The reference runs on every device; gradients are those of the reference, recomputed in the backward pass, so an
    op never needs a hand-written derivative to be healed or searched over.
    """
    name = schema.split("(", 1)[0]
    qualified = f"slim::{name}"
    _REFERENCES[qualified] = reference
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(qualified, fake, lib=_LIBRARY)
    if differentiable:
        torch.library.register_autograd(
            qualified, _recomputed_backward(reference, _types_in(schema)), setup_context=_save_inputs, lib=_LIBRARY
        )


def _save_inputs(
    ctx: Any, inputs: tuple[Any, ...], output: Any, keyword_only_inputs: dict[str, Any] | None = None
) -> None:
    ctx.tensors = [i for i, value in enumerate(inputs) if isinstance(value, torch.Tensor)]
    ctx.others = [None if i in ctx.tensors else value for i, value in enumerate(inputs)]
    ctx.keywords = keyword_only_inputs or {}
    ctx.save_for_backward(*(inputs[i] for i in ctx.tensors))


# c10::ScalarType: autograd hands a dtype on as its number.
_BY_NUMBER = {
    0: torch.uint8, 1: torch.int8, 2: torch.int16, 3: torch.int32, 4: torch.int64, 5: torch.float16, 6: torch.float32,
    7: torch.float64, 11: torch.bool, 15: torch.bfloat16,
}  # fmt: skip


def _types_in(schema: str) -> frozenset[str]:
    """The arguments that are dtypes."""
    arguments = torch._C.parse_schema(schema).arguments
    return frozenset(a.name for a in arguments if str(a.real_type).removeprefix("Optional[").startswith("ScalarType"))


def _recomputed_backward(reference: Callable[..., Any], types: frozenset[str]) -> Callable[..., Any]:
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        inputs = list(ctx.others)
        leaves = {}
        for index, tensor in zip(ctx.tensors, ctx.saved_tensors, strict=True):
            inputs[index] = tensor.detach()
            if tensor.is_floating_point():
                leaves[index] = inputs[index].requires_grad_()
        keywords = {k: _BY_NUMBER.get(v, v) if k in types else v for k, v in ctx.keywords.items()}
        with torch.enable_grad():
            outputs = reference(*inputs, **keywords)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        pairs = [(out, grad) for out, grad in zip(outputs, grad_outputs, strict=True) if grad is not None]
        grads = torch.autograd.grad(
            [out for out, _ in pairs], list(leaves.values()), [grad for _, grad in pairs], allow_unused=True
        )
        by_index = dict(zip(leaves, grads, strict=True))
        return tuple(by_index.get(i) for i in range(len(inputs)))

    return backward
