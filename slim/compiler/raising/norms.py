"""Norms: from squares, means and roots to ``slim.rms_norm`` and ``slim.layer_norm`` with their gain convention."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from slim.compiler.near import Exactly, LastAxis
from slim.compiler.raising.cleanup import CASTS
from slim.compiler.rules import Either, Match, Near, NearMiss, Pattern, Rule, Through, Var, call

aten, slim = torch.ops.aten, torch.ops.slim
RMS, LN = slim.rms_norm.default, slim.layer_norm.default
_NUMBER = (int, float)


def _number(name: str) -> Var:
    return Var(name, lambda v: isinstance(v, _NUMBER) and not isinstance(v, bool))


def _dtype(node: Any) -> torch.dtype:
    return node.meta["val"].dtype


def _is_gain(m: Match, gain: Any, x: fx.Node) -> bool:
    """A weight with one number a channel of x."""
    if m.program.weight_of(gain) is None:
        return False
    shape, width = gain.meta["val"].shape, x.meta["val"].shape[-1]
    if len(shape) == 1 and shape[0] == width:
        return True
    raise NearMiss(f"the gain {gain.target} is {list(shape)}, not one number for each of {width} channels")


# -- RMSNorm, in the order the pieces are put together -----------------------------------------------------------------

_SQUARE: Pattern = Either(
    (
        call(aten.pow.Tensor_Scalar, args=("x", 2)),
        call(aten.mul.Tensor, args=("x", "x")),
        call(aten.square.default, args=("x",)),
    )
)
_MEAN_SQUARE = call(aten.mean.dim, args=(_SQUARE, LastAxis("x", "its mean"), True))


def _raised(value: Pattern) -> Pattern:
    return call(aten.add.Tensor, args=(value, _number("eps")), commutes=True)


def _inverse(root: Pattern) -> Pattern:
    """1 / root, as x is multiplied by it."""
    return call(aten.reciprocal.default, args=(root,))


def _sqrt(value: Pattern) -> Pattern:
    return Either((call(aten.sqrt.default, args=(value,)), call(aten.pow.Tensor_Scalar, args=(value, 0.5))))


def _rsqrt(value: Pattern) -> Pattern:
    return Either(
        (
            call(aten.rsqrt.default, args=(value,)),
            call(aten.pow.Tensor_Scalar, args=(value, -0.5)),
            _inverse(_sqrt(value)),
        )
    )


def _product(x: Any, factor: Pattern) -> Pattern:
    return call(aten.mul.Tensor, args=(x, factor), commutes=True)


def _quotient(x: Any, divisor: Pattern) -> Pattern:
    return call(aten.div.Tensor, args=(x, divisor))


def _over(x: Any, root: Pattern) -> Pattern:
    """x over a root, whose inverse may be multiplied with."""
    return Either((_quotient(x, root), _product(x, _inverse(root))))


def _near_norms(x: Any, square: Pattern, root: Pattern, what: str) -> tuple[Near, ...]:
    """What looks like the norm of x by the square root of ``square``, which is ``what``, and is another function."""
    bounded = call(aten.clamp.default, aten.clamp_min.default, args=(square, _number("eps")))
    return (
        Near(_over(x, _raised(root)), f"its eps is added to the root, not to the {what}"),
        Near(
            Either((_quotient(x, _sqrt(bounded)), _product(x, _rsqrt(bounded)))),
            f"its eps bounds the {what}, and is not added",
        ),
        Near(Either((_quotient(x, root), _product(x, _rsqrt(square)))), f"it has no eps beside the {what}"),
    )


def _bare(m: Match) -> fx.Node | None:
    if _dtype(m["x"]) != torch.float32:
        raise NearMiss(f"the root is taken in {_dtype(m['x'])}, and slim::rms_norm takes it in float32")
    return m.new(RMS, m["x"], None, eps=float(m["eps"]))


def _narrowed(m: Match) -> fx.Node | None:
    """cast(norm(cast(x, f32)), type of x): the casts are the norm's own."""
    if _dtype(m["x"]) != _dtype(m.node):
        return None
    return m.new(RMS, m["x"], m["w"], eps=m["eps"], offset=m["offset"], gain_in_float=m["w"] is not None)


def _gained(m: Match) -> fx.Node | None:
    """norm(x) * w, and norm(x) * (w + 1); the gain may have been cast to float32 on the way."""
    if not _is_gain(m, m["w"], m["x"]):
        return None
    offset, x = float(m.get("offset", 0.0)), m["x"]
    if _dtype(m["w"]) == torch.float32 and _dtype(x) == torch.float32:
        return m.new(RMS, x, m["w"], eps=m["eps"], offset=offset)
    if _dtype(m.node) != torch.float32:
        return m.new(RMS, x, m["w"], eps=m["eps"], offset=offset)
    if _dtype(x) == torch.float32 and m.node.meta["val"].dtype == torch.float32:  # the narrowing cast comes after
        return m.new(RMS, x, m["w"], eps=m["eps"], offset=offset, gain_in_float=True)
    return None


_NORM = call(RMS, args=("x", None), eps="eps")
_GAIN = Through(CASTS, Var("w", lambda v: isinstance(v, fx.Node)))
_WIDENED = call(*CASTS, args=("x",))

RMS_RULES = (
    Rule(
        "x * rsqrt(mean(x^2) + eps) = rms_norm(x)",
        _product("x", _rsqrt(_raised(_MEAN_SQUARE))),
        _bare,
        near=_near_norms("x", _MEAN_SQUARE, _sqrt(_MEAN_SQUARE), "mean square"),
    ),
    Rule("x / sqrt(mean(x^2) + eps) = rms_norm(x)", _quotient("x", _sqrt(_raised(_MEAN_SQUARE))), _bare),
    Rule(
        "cast(rms_norm(cast(x), w)) = rms_norm(x, w)",
        call(*CASTS, args=(call(RMS, args=(_WIDENED, "w"), eps="eps", offset="offset"),)),
        _narrowed,
    ),
    Rule(
        "rms_norm(x) * (w + 1) = rms_norm(x, w, offset=1)",
        call(
            aten.mul.Tensor,
            args=(_NORM, call(aten.add.Tensor, args=(_GAIN, _number("offset")), commutes=True)),
            commutes=True,
        ),
        _gained,
    ),
    Rule("rms_norm(x) * w = rms_norm(x, w)", call(aten.mul.Tensor, args=(_NORM, _GAIN), commutes=True), _gained),
    Rule(
        "aten.rms_norm(x, w) = rms_norm(x, w)",
        call(aten.rms_norm.default, args=("x", "shape", "w"), eps="eps"),
        lambda m: _from_aten_rms(m),
    ),
)


def _from_aten_rms(m: Match) -> fx.Node | None:
    if len(m["shape"]) != 1:
        raise NearMiss(f"it normalises {len(m['shape'])} dimensions at once")
    eps = torch.finfo(_dtype(m["x"])).eps if m["eps"] is None else float(m["eps"])
    return m.new(RMS, m["x"], m["w"], eps=eps)


# -- LayerNorm ---------------------------------------------------------------------------------------------------------


def _from_aten_layer_norm(m: Match) -> fx.Node | None:
    if len(m["shape"]) != 1:
        raise NearMiss(f"it normalises {len(m['shape'])} dimensions at once")
    return m.new(LN, m["x"], m["w"], m["b"], eps=float(m["eps"]))


def _centred(m: Match) -> fx.Node | None:
    if _dtype(m["x"]) != torch.float32:
        raise NearMiss(f"the variance is taken in {_dtype(m['x'])}")
    return m.new(LN, m["x"], None, None, eps=float(m["eps"]))


def _narrowed_layer(m: Match) -> fx.Node | None:
    """The casts around a LayerNorm and of its gain are its own: it sums in float32 and rounds once."""
    narrow = _dtype(m.node)
    gain, bias = (_peel_casts(value) for value in (m["w"], m["b"]))
    if _dtype(m["x"]) != narrow or any(value is not None and _dtype(value) != narrow for value in (gain, bias)):
        return None
    return m.new(LN, m["x"], gain, bias, eps=m["eps"], offset=m["offset"])


def _peel_casts(node: Any) -> Any:
    while isinstance(node, fx.Node) and node.target in CASTS:
        node = node.args[0]
    return node


def _gained_layer(m: Match) -> fx.Node | None:
    if not _is_gain(m, m["w"], m["x"]):
        return None
    gain = m["w"]
    if _dtype(gain) != _dtype(m["x"]):  # widened for the product: the rule that narrows the norm takes that back
        gain = m.new(aten._to_copy.default, gain, dtype=_dtype(m["x"]))
    return m.new(LN, m["x"], gain, None, eps=m["eps"])


def _shifted_gain(m: Match) -> fx.Node | None:
    if not _is_gain(m, m["w"], m["x"]):
        return None
    return m.new(LN, m["x"], m["w"], m["b"], eps=m["eps"], offset=float(m["offset"]))


_MEAN = call(aten.mean.dim, args=("x", LastAxis("x", "its mean"), True))
_CENTRED = call(aten.sub.Tensor, args=("x", _MEAN))


def _spread(op: Any) -> Pattern:
    """The variance or standard deviation of x by PyTorch's own operation."""
    return call(
        op, args=("x", LastAxis("x", "its mean"), Exactly(False, "its variance divides by n - 1, not by n"), True)
    )


_VARIANCE = Either(
    (
        call(
            aten.mean.dim,
            args=(
                Either(
                    (
                        call(aten.pow.Tensor_Scalar, args=(_CENTRED, 2)),
                        call(aten.mul.Tensor, args=(_CENTRED, _CENTRED)),
                        call(aten.square.default, args=(_CENTRED,)),
                    )
                ),
                LastAxis("x", "its mean"),
                True,
            ),
        ),
        _spread(aten.var.dim),
    )
)
_DEVIATION = Either((_spread(aten.std.dim), _sqrt(_VARIANCE)))
_BARE_LN = call(LN, args=("x", None, None), eps="eps")

LAYER_NORM_RULES = (
    Rule(
        "aten.layer_norm(x, w, b) = layer_norm(x, w, b)",
        call(aten.layer_norm.default, args=("x", "shape", "w", "b", "eps")),
        _from_aten_layer_norm,
    ),
    Rule(
        "(x - mean) * rsqrt(mean((x - mean)^2) + eps) = layer_norm(x)",
        Either((_product(_CENTRED, _rsqrt(_raised(_VARIANCE))), _quotient(_CENTRED, _sqrt(_raised(_VARIANCE))))),
        _centred,
        near=_near_norms(_CENTRED, _VARIANCE, _DEVIATION, "variance"),
    ),
    Rule(
        "layer_norm(x) * w = layer_norm(x, w)",
        call(aten.mul.Tensor, args=(_BARE_LN, _GAIN), commutes=True),
        _gained_layer,
    ),
    Rule(
        "layer_norm(x, w + 1, b) = layer_norm(x, w, b, offset=1)",
        call(LN, args=("x", call(aten.add.Tensor, args=(_GAIN, _number("offset")), commutes=True), "b"), eps="eps"),
        _shifted_gain,
    ),
    Rule(
        "cast(layer_norm(cast(x), w, b)) = layer_norm(x, w, b)",
        call(*CASTS, args=(call(LN, args=(_WIDENED, "w", "b"), eps="eps", offset="offset"),)),
        _narrowed_layer,
    ),
)

NORMS = LAYER_NORM_RULES + RMS_RULES  # a centred root mean square is a LayerNorm, so that is tried first
