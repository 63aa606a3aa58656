"""Scale moves keep the function, reach every site that data flow allows, and leave the others with a reason."""

import math

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slim.compiler.probe import make_probe
from slim.compiler.scaling import scale_sites, scale_weight, settle
from slim.compiler.scaling.carry import reshaped_labels
from slim.compiler.verify import verify
from slim.passes import FoldNorms
from tests.programs import Counted, lifted, program


def matrix(*shape, dtype=torch.float32):
    return (torch.randn(*shape) * shape[-1] ** -0.5).to(dtype)


def gain(width=8, dtype=torch.float32):
    return (torch.rand(width) + 0.5).to(dtype)


def scale(size, seed=0, spread=1.5):
    return torch.exp(torch.randn(size, generator=torch.Generator().manual_seed(seed)) * spread)


def moved(before, after):
    probe = make_probe(before)
    return probe.error(probe.run(before), probe.run(after))


def shifted(before, spread=1.5):
    """(the Program with every site scaled at random, the sites, the skips)."""
    after = before.copy()
    sites, skips = scale_sites(after)
    for number, site in enumerate(sites):
        site.apply(after, scale(site.size, number, spread))
    settle(after)
    verify(after, "scaling")
    return after, sites, skips


def only(before):
    (site,), _ = scale_sites(before)
    return site


NORM = "n = slim.rms_norm.default(x, weights['norm.weight'], eps=1e-6)"


# -- norms -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("in_float", [True, False])
def test_an_rms_gain_takes_the_scale_and_every_reader_makes_up_for_it(offset, in_float):
    before = program(
        f"""
        n = slim.rms_norm.default(x, weights["norm.weight"], eps=1e-6, offset={offset}, gain_in_float={in_float})
        q = aten.linear.default(n, weights["q.weight"])
        rows = aten.reshape.default(n, [-1, 8])
        k = aten.linear.default(rows, weights["k.weight"], weights["k.bias"])
        return (q, k)
        """,
        {"norm.weight": gain(), "q.weight": matrix(6, 8), "k.weight": matrix(4, 8), "k.bias": torch.randn(4)},
    )
    after, (site,), skips = shifted(before)
    assert (site.name, site.size, skips) == ("norm.weight", 8, [])
    assert [reader.weight for reader in site.readers] == ["q.weight", "k.weight"]
    assert len(site.values) == 2  # two nodes whose statistics count
    assert moved(before, after) < 1e-5
    effective = after.weights["norm.weight"] + offset
    assert torch.allclose(effective, (before.weights["norm.weight"] + offset) / scale(8), rtol=1e-4)
    assert torch.allclose(after.weights["q.weight"], before.weights["q.weight"] * scale(8), rtol=1e-4)


def test_a_layer_norm_divides_its_shift_too():
    before = program(
        """
        n = slim.layer_norm.default(x, weights["norm.weight"], weights["norm.bias"], eps=1e-5)
        y = aten.linear.default(n, weights["q.weight"])
        return (y,)
        """,
        {"norm.weight": gain(), "norm.bias": torch.randn(8), "q.weight": matrix(6, 8)},
    )
    after, _, _ = shifted(before)
    assert moved(before, after) < 1e-5
    assert torch.allclose(after.weights["norm.bias"], before.weights["norm.bias"] / scale(8), rtol=1e-5)


def test_a_dead_gain_moves_the_shift_and_nothing_turns_infinite():
    weights = {"norm.weight": gain(), "norm.bias": torch.randn(8), "q.weight": matrix(6, 8)}
    weights["norm.weight"][3] = 0
    before = program(
        """
        n = slim.layer_norm.default(x, weights["norm.weight"], weights["norm.bias"], eps=1e-5)
        y = aten.linear.default(n, weights["q.weight"])
        return (y,)
        """,
        weights,
    )
    after, _, _ = shifted(before)
    assert moved(before, after) < 1e-5
    assert after.weights["norm.weight"][3] == 0


@pytest.mark.parametrize("call", ["slim.rms_norm.default(x, None", "slim.layer_norm.default(x, None, None"])
def test_a_norm_without_a_gain_gets_one(call):
    before = program(
        f"n = {call}, eps=1e-6)\ny = aten.linear.default(n, weights['q.weight'])\nreturn (y,)",
        {"q.weight": matrix(6, 8)},
    )
    after, _, _ = shifted(before)
    assert moved(before, after) < 1e-5
    (name,) = after.facts.added
    assert torch.allclose(after.weights[name], 1 / scale(8))


def test_a_gain_that_was_folded_away_comes_back_under_its_name():
    from slim.compiler.passes_base import Context

    before = lifted("gemma")
    folded = before.copy()
    FoldNorms().run(folded, Context())
    folded.clean()
    after, _, _ = shifted(folded)
    assert "model.layers.0.input_layernorm.weight" in after.weights
    assert after.facts.added == []
    assert set(after.facts.retired) < set(folded.facts.retired)
    assert moved(before, after) < 1e-5


def test_the_rounding_of_a_gain_near_minus_one_is_made_up_for_by_the_readers():
    weights = {"norm.weight": torch.zeros(8, dtype=torch.bfloat16), "q.weight": matrix(6, 8, dtype=torch.bfloat16)}
    before = program(
        """
        n = slim.rms_norm.default(x, weights["norm.weight"], eps=1e-6, offset=1.0, gain_in_float=True)
        y = aten.linear.default(n, weights["q.weight"])
        return (y,)
        """,
        dict(weights),
        "x: bf16[B, S, 8]",
    )
    site = only(before)
    after = before.copy()
    wanted = torch.full((8,), 60.0)
    got = site.apply(after, wanted)
    stored = after.weights["norm.weight"].float() + 1
    assert abs(float(stored[0] * 60) - 1) > 0.02  # bfloat16 has no 1/60 - 1
    assert torch.equal(got, 1 / stored)
    assert torch.equal(after.weights["q.weight"], (weights["q.weight"].float() / stored).bfloat16())


def test_a_channel_whose_gain_would_vanish_keeps_its_scale():
    before = program(
        """
        n = slim.rms_norm.default(x, weights["norm.weight"], eps=1e-6, offset=1.0, gain_in_float=True)
        y = aten.linear.default(n, weights["q.weight"])
        return (y,)
        """,
        {"norm.weight": torch.zeros(8, dtype=torch.bfloat16), "q.weight": matrix(6, 8, dtype=torch.bfloat16)},
        "x: bf16[B, S, 8]",
    )
    wanted = torch.ones(8)
    wanted[2] = 1e6
    assert only(before).apply(before, wanted)[2] == 1.0


# -- values, gates, activations ----------------------------------------------------------------------------------------


def attention(heads, groups, width=4):
    lines = ["q = aten.linear.default(x, weights['q'])", "k = aten.linear.default(x, weights['k'])",
             "v = aten.linear.default(x, weights['v'], weights['v.bias'])"]  # fmt: skip
    for name, count in (("q", heads), ("k", groups), ("v", groups)):
        lines.append(f"{name}1 = aten.reshape.default({name}, [2, 5, {count}, {width}])")
        lines.append(f"{name}2 = aten.transpose.int({name}1, 1, 2)")
    lines += ["a = slim.attention.default(q2, k2, v2, layer=0, scale=0.5)", "b = aten.transpose.int(a, 1, 2)",
              f"c = aten.reshape.default(b, [2, 5, {heads * width}])",
              "y = aten.linear.default(c, weights['o'])", "return (y,)"]  # fmt: skip
    weights = {
        "q": matrix(heads * width, 8), "k": matrix(groups * width, 8), "v": matrix(groups * width, 8),
        "v.bias": torch.randn(groups * width), "o": matrix(8, heads * width),
    }  # fmt: skip
    return program("\n".join(lines), weights, "x: f32[2, 5, 8]")


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (6, 2), (4, 1)])
def test_values_take_a_scale_that_the_query_heads_of_a_kv_head_share(heads, groups):
    before = attention(heads, groups)
    after, (site,), _ = shifted(before)
    assert (site.name, site.size) == ("v", groups * 4)
    assert moved(before, after) < 1e-5
    columns = site.readers[0].columns.view(heads, 4)
    expected = torch.arange(groups * 4).view(groups, 4).repeat_interleave(heads // groups, 0)
    assert torch.equal(columns, expected)


@pytest.mark.parametrize(
    ("lines", "power", "absorber"),
    [
        ("g = aten.silu.default(a)\nh = aten.mul.Tensor(g, u)", 1, "up"),
        ("g = aten.gelu.default(a)\nh = aten.mul.Tensor(u, g)", 1, "up"),
        ("g = aten.relu.default(a)\nh = aten.mul.Tensor(g, u)", 1, "up"),  # the side that does not bend
        ("h = aten.relu.default(u)", 1, "up"),
        ("r = aten.relu.default(u)\nh = aten.pow.Tensor_Scalar(r, 2)", 2, "up"),
        ("r = aten.relu.default(u)\nh = aten.square.default(r)", 2, "up"),
        ("r = aten.relu.default(u)\nh = aten.mul.Tensor(r, r)", 2, "up"),
        ("h = aten.leaky_relu.default(u, 0.1)", 1, "up"),
        ("h = aten.alias.default(u)", 1, "up"),
        ("h = aten.div.Tensor(u, 3.0)", 1, "up"),
    ],
)
def test_a_scale_passes_gates_and_what_is_homogeneous(lines, power, absorber):
    before = program(
        "\n".join([
            "a = aten.linear.default(x, weights['gate'])",
            "u = aten.linear.default(x, weights['up'], weights['up.bias'])",
            lines,
            "y = aten.linear.default(h, weights['down'])",
            "return (y,)",
        ]),
        {"gate": matrix(6, 8), "up": matrix(6, 8), "up.bias": torch.randn(6), "down": matrix(8, 6)},
    )  # fmt: skip
    before.clean()
    after, (site,), _ = shifted(before)
    assert (site.name, site.power) == (absorber, power)
    assert moved(before, after) < 1e-5
    assert torch.allclose(after.weights["down"], before.weights["down"] * scale(6), rtol=1e-5)
    assert not torch.allclose(after.weights["up"], before.weights["up"], rtol=0.1)


def test_experts_share_a_scale_and_the_router_makes_up_for_it_too():
    before = program(
        f"""
        {NORM}
        r = aten.linear.default(n, weights["router"])
        best = aten.argmax.default(r, 1)
        g = slim.expert_linear.default(n, weights["gate"], None, best)
        u = slim.expert_linear.default(n, weights["up"], weights["up.bias"], best)
        s = aten.silu.default(g)
        h = aten.mul.Tensor(s, u)
        y = slim.expert_linear.default(h, weights["down"], None, best)
        return (y,)
        """,
        {
            "norm.weight": gain(), "router": matrix(3, 8), "gate": matrix(3, 6, 8), "up": matrix(3, 6, 8),
            "up.bias": torch.randn(3, 6), "down": matrix(3, 8, 6),
        },
        "x: f32[B, 8]",
    )  # fmt: skip
    after, sites, skips = shifted(before)
    assert [(site.name, [r.weight for r in site.readers]) for site in sites] == [
        ("norm.weight", ["router", "gate", "up"]),
        ("up", ["down"]),
    ]
    assert skips == []
    assert moved(before, after) < 1e-5


def test_of_a_fused_projection_only_the_values_are_scaled():
    before = program(
        """
        f = aten.linear.default(x, weights["qkv"], weights["qkv.bias"])
        parts = aten.split_with_sizes.default(f, [8, 4, 4], 2)
        a = parts[0]
        k = parts[1]
        v = parts[2]
        b = aten.reshape.default(a, [2, 5, 2, 4])
        q = aten.transpose.int(b, 1, 2)
        k1 = aten.unsqueeze.default(k, 1)
        v1 = aten.unsqueeze.default(v, 1)
        c = slim.attention.default(q, k1, v1, layer=0, scale=0.5)
        d = aten.transpose.int(c, 1, 2)
        e = aten.reshape.default(d, [2, 5, 8])
        y = aten.linear.default(e, weights["o"])
        return (y,)
        """,
        {"qkv": matrix(16, 8), "qkv.bias": torch.randn(16), "o": matrix(6, 8)},
        "x: f32[2, 5, 8]",
    )
    after, (site,), _ = shifted(before)
    assert site.size == 4
    assert site.channels.tolist() == [-1] * 12 + [0, 1, 2, 3]
    assert site.readers[0].columns.tolist() == [0, 1, 2, 3] * 2
    assert torch.equal(after.weights["qkv"][:12], before.weights["qkv"][:12])
    assert moved(before, after) < 1e-5


# -- what is left alone ------------------------------------------------------------------------------------------------

READ = "y = aten.linear.default(n, weights['q'])"


@pytest.mark.parametrize(
    ("body", "site", "reason"),
    [
        (f"{READ}\nz = aten.add.Tensor(x, n)", "norm.weight", "it goes to aten.add.Tensor, with x"),
        (f"{READ}\nz = aten.alias.default(n)", "norm.weight", "it is a result of the model"),
        (f"{READ}\nz = aten.mul.Tensor(x, weights['norm.weight'])", "norm.weight", "is read by aten.mul.Tensor too"),
        (f"{READ}\nz = aten.linear.default(x, weights['q'])", "norm.weight", "q is read by aten.linear.default too"),
        ("w = aten.t.default(weights['q'])\ny = aten.linear.default(n, w)", "norm.weight", "computed, by aten.t"),
        ("g = aten.gelu.default(n)\ny = aten.linear.default(g, weights['q'])", "q", "comes from aten.gelu.default"),
        ("m = aten.sum.dim_IntList(n, [1], True)\nd = aten.mul.Tensor(n, m)\ny = aten.linear.default(d, weights['q'])",
         "norm.weight", "it goes to aten.sum.dim_IntList, which sums over channels"),
        ("r = aten.reshape.default(n, [-1, 4])\ny = aten.linear.default(r, weights['half'])", "norm.weight",
         "with another scale for each row"),
        ("h = aten.clamp.default(n, -1.0, 1.0)\ny = aten.linear.default(h, weights['q'])", "q", "aten.clamp.default"),
        ("h = aten.masked_fill.Scalar(n, weights['mask'], 1.0)\ny = aten.linear.default(h, weights['q'])",
         "norm.weight", "which puts 1.0 in places"),
        ("s = aten.square.default(n)\ny = aten.linear.default(n, weights['q'])\n"
         "z = aten.linear.default(s, weights['p'])",
         "norm.weight", "in different powers: [1.0, 2.0]"),
        ("y = aten.linear.default(x, weights['q'])\nz = aten.neg.default(n)", "q", "the model's inputs"),
    ],
)  # fmt: skip
def test_what_cannot_be_scaled_is_left_alone_with_the_reason(body, site, reason):
    results = ", ".join(line.split()[0] for line in body.splitlines() if line[0] in "yz")
    before = program(
        f"{NORM}\n{body}\nreturn ({results},)",
        {"norm.weight": gain(), "q": matrix(8, 8), "p": matrix(8, 8), "half": matrix(4, 4),
         "mask": torch.zeros(8, dtype=torch.bool)},
        "x: f32[8, 8]",
    )  # fmt: skip
    before.clean()
    sites, skips = scale_sites(before)
    assert sites == []
    assert any(skip.site == site and reason in skip.reason for skip in skips), skips


def test_a_scale_of_the_wrong_size_or_sign_is_refused():
    before = program(f"{NORM}\n{READ}\nreturn (y,)", {"norm.weight": gain(), "q": matrix(8, 8)})
    site = only(before)
    for bad in (torch.ones(7), torch.zeros(8), torch.full((8,), math.inf), -torch.ones(8)):
        with pytest.raises(ValueError, match=r"norm\.weight takes 8 positive numbers"):
            site.apply(before, bad)


# -- weights -----------------------------------------------------------------------------------------------------------


def test_scales_that_meet_in_one_weight_are_rounded_once():
    weight = matrix(4, 6, dtype=torch.bfloat16)
    held = program("y = aten.linear.default(x, weights['w'])\nreturn (y,)", {"w": weight}, "x: bf16[B, 6]")
    rows, columns = scale(4, 1), scale(6, 2)
    scale_weight(held, "w", rows=rows)
    scale_weight(held, "w", columns=columns)
    scale_weight(held, "w", columns=1 / columns)
    scale_weight(held, "w", columns=columns)
    exact = (weight.float() * rows[:, None] * (columns * (1 / columns) * columns)).bfloat16()
    assert torch.equal(held.weights["w"], exact)
    settle(held)
    assert not held.weights.is_deferred("w")


def test_weights_on_disk_stay_there_and_one_is_held_at_a_time():
    weights = {"norm.weight": gain(), "q": Counted(matrix(6, 8)), "k": Counted(matrix(4, 8))}
    before = program(
        f"{NORM}\nq = aten.linear.default(n, weights['q'])\nk = aten.linear.default(n, weights['k'])\nreturn (q, k)",
        weights,
    )
    Counted.reset()
    after, _, _ = shifted(before)
    assert weights["q"].reads == weights["k"].reads == 0
    assert moved(before, after) < 1e-5
    assert (Counted.alive, Counted.most) == (0, 1)


# -- in general --------------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_random_graphs_keep_their_function_under_random_scales(data):
    width, seed = data.draw(st.sampled_from([4, 6, 12])), data.draw(st.integers(0, 1000))
    norm = data.draw(st.sampled_from(["rms", "layer"]))
    bias = ", weights['b']" if norm == "layer" else ""
    lines = [f"v0 = slim.{norm}_norm.default(x, weights['g']{bias}, eps=1e-5)"]
    weights, width_of = {"g": gain(8), "b": torch.randn(8)}, 8
    for step in range(1, data.draw(st.integers(1, 8)) + 1):
        kind = data.draw(
            st.sampled_from(["linear", "relu", "square", "scalar", "heads", "swap", "gate", "silu", "add"])
        )
        last = f"v{step - 1}"
        if kind == "linear":
            weights[f"w{step}"], width_of = matrix(width, width_of), width
            lines.append(f"v{step} = aten.linear.default({last}, weights['w{step}'])")
        elif kind == "heads":
            a, b = data.draw(st.sampled_from([(2, 1), (1, 2)]))
            lines += [f"h{step} = aten.reshape.default({last}, [2, 3, 2, {width_of // 2}])",
                      f"t{step} = aten.permute.default(h{step}, [0, {a}, {b}, 3])",
                      f"u{step} = aten.permute.default(t{step}, [0, {a}, {b}, 3])",
                      f"v{step} = aten.reshape.default(u{step}, [2, 3, {width_of}])"]  # fmt: skip
        elif kind == "swap":
            lines += [f"t{step} = aten.transpose.int({last}, 0, 1)", f"v{step} = aten.transpose.int(t{step}, 0, 1)"]
        elif kind == "gate":
            lines += [f"s{step} = aten.mean.dim(x, [-1], True)", f"v{step} = aten.mul.Tensor({last}, s{step})"]
        else:
            call = {"relu": "relu.default({0})", "square": "square.default({0})", "scalar": "mul.Tensor({0}, -0.7)",
                    "silu": "silu.default({0})", "add": "add.Tensor({0}, 0.3)"}[kind]  # fmt: skip
            lines.append(f"v{step} = aten.{call.format(last)}")
    weights["end"] = matrix(5, width_of)
    lines += [f"y = aten.linear.default(v{step}, weights['end'])", "return (y,)"]
    torch.manual_seed(seed)
    before = program("\n".join(lines), weights, "x: f32[2, 3, 8]")
    before.clean()
    after, sites, skips = shifted(before, spread=0.7)
    assert moved(before, after) < 1e-5
    linears = {reader.node for site in sites for reader in site.readers}
    assert len(linears) + len(skips) >= 1


SYMBOLS = dict(zip(sympy.symbols("B S"), (3, 5), strict=True))


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.sampled_from([1, 2, 3, 4, *SYMBOLS]), min_size=1, max_size=4),
    st.data(),
)
def test_labels_are_reshaped_as_the_values_are_or_not_at_all(before, data):
    numbers = [SYMBOLS.get(size, size) for size in before]
    cut = data.draw(st.integers(0, len(before)))
    merged = (
        [*before[:cut], math.prod(before[cut:])]
        if data.draw(st.booleans())
        else [math.prod(before[:cut]), *before[cut:]]
    )
    after = data.draw(st.sampled_from([merged, [*before, 1], [1, *before], [math.prod(before)]]))
    after = [int(size) if not getattr(size, "free_symbols", None) else size for size in after]
    backwards = data.draw(st.booleans())
    if backwards:
        before, after = after, before
    plain = [[int(sympy.sympify(size).subs(SYMBOLS)) for size in shape] for shape in (before, after)]
    depends = [data.draw(st.booleans()) and isinstance(size, int) for size in before]
    shape = [size if yes else 1 for size, yes in zip(plain[0], depends, strict=True)]
    labels = torch.randperm(math.prod(shape)).view(shape)
    found = reshaped_labels(labels, before, after)
    assert math.prod(numbers) == math.prod(plain[1])
    if found is not None:
        assert found.dim() == len(after)
        assert torch.equal(found.expand(plain[1]), labels.expand(plain[0]).reshape(plain[1]))
    elif all(isinstance(size, int) for size in (*before, *after)):
        pytest.fail("sizes that are known are always reshaped")


@pytest.mark.parametrize(
    ("name", "count", "covered"),
    [("llama", 9, 15), ("qwen2", 5, 8), ("gemma", 4, 7), ("gpt2", 3, 5), ("mixtral", 5, 9)],
)
def test_models_keep_their_function(name, count, covered):
    before = lifted(name)
    after, sites, skips = shifted(before)
    assert (len(sites), sum(len(site.readers) for site in sites)) == (count, covered), skips
    assert moved(before, after) < 1e-5
