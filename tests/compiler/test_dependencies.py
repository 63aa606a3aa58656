"""Dependency groups: what they say, and that taking units out leaves what zeros in their place would."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slim import errors
from slim.compiler.dependencies import By, Dependencies, Group, Kind
from slim.compiler.passes_base import Context
from slim.compiler.probe import make_probe
from slim.compiler.program import Program
from slim.compiler.uses import LINEAR
from slim.compiler.verify import verify
from slim.passes import Quantize
from tests import compiled
from tests.programs import lifted, model, program


def zeroed(original: Program, groups: dict[Group, list[int]]) -> Program:
    """The program with every weight of the units at zero, numbers that pick things aside."""
    program = original.copy()
    for group, units in groups.items():
        for member in group.members:
            if program.weights.dtype(member.weight) in (torch.int64, torch.uint8):
                continue  # an order; or packed numbers, whose scales are zeroed
            value = program.weights[member.weight].clone()
            indices = torch.isin(member.unit, torch.tensor(units)).nonzero()[:, 0]
            program.weights[member.weight] = value.index_fill_(member.dim, indices, 0)
    return program


def some(found: Dependencies, *kinds: Kind) -> dict[Group, list[int]]:
    """A third of the units of every group, at random."""
    generator = torch.Generator().manual_seed(1)
    return {
        group: torch.randperm(group.units, generator=generator)[: max(1, group.units // 3)].tolist()
        for group in found.groups
        if not kinds or group.kind in kinds
    }


def check_removal(original: Program, by: By = "kv", *kinds: Kind) -> None:
    """Units taken out change the output as zeros do, and that is a change."""
    smaller = original.copy()
    found = Dependencies(smaller, by)
    chosen = some(found, *kinds)
    expected = zeroed(original, chosen)
    found.remove(chosen)
    smaller.clean()
    verify(smaller, "removal")
    probe = make_probe(original)
    outputs, wanted = probe.run(smaller), probe.run(expected)
    assert probe.error(wanted, outputs) < 1e-5
    assert probe.error(probe.run(original), outputs) > 1e-3
    assert smaller.parameters < original.parameters


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gemma", "phi3", "gpt2", "gpt_neox", "opt"])
def test_units_taken_out_are_zeros(name: str) -> None:
    original = lifted(name)
    check_removal(original)
    if any(group.kind is Kind.QUERY_HEAD for group in Dependencies(original, "query").groups):
        check_removal(original, "query", Kind.QUERY_HEAD)


@pytest.mark.parametrize("name", ["falcon", "bloom", "bert"])
def test_units_of_models_that_share_or_fuse_otherwise_taken_out_are_zeros(name: str) -> None:
    check_removal(compiled.lifted(name))


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_neurons_and_heads_of_mixtures_taken_out_are_zeros(name: str) -> None:
    check_removal(lifted(name) if name == "mixtral" else compiled.lifted(name), "kv", Kind.NEURON, Kind.KV_HEAD)


def test_an_expert_taken_out_is_one_that_is_never_chosen() -> None:
    original = lifted("mixtral")
    smaller, masked = original.copy(), original.copy()
    found = Dependencies(smaller)
    (experts,) = [group for group in found.groups if group.kind is Kind.EXPERT]
    found.remove({experts: [2, 5]})
    smaller.clean()
    verify(smaller, "removal")
    router = next(m.weight for m in experts.members if m.what == "row")
    (logits,) = [use for use in masked.weight_node(router).users if use.target is LINEAR]
    masked.weights["never"] = torch.zeros(8).index_fill_(0, torch.tensor([2, 5]), -torch.inf)
    masked.facts.constants.add("never")
    masked.weights.masks.add("never")
    never = masked.weight_node("never")
    readers = list(logits.users)
    added = masked.insert(logits.next, torch.ops.aten.add.Tensor, logits, never, like=logits)
    for reader in readers:
        reader.replace_input_with(logits, added)
    probe = make_probe(original)
    assert probe.error(probe.run(masked), probe.run(smaller)) < 1e-5


def test_no_fewer_experts_are_left_than_a_token_is_sent_to() -> None:
    found = Dependencies(lifted("mixtral"))
    (experts,) = [group for group in found.groups if group.kind is Kind.EXPERT]
    with pytest.raises(errors.BadInput, match="picks 2 experts, and 1 would be left"):
        found.remove({experts: range(7)})


def test_a_group_reads_as_a_sentence() -> None:
    heads, neurons = Dependencies(lifted("llama")).groups[:2]
    assert str(heads) == (
        "kv head i of model.layers.0.self_attn: rows 16 i to + 15 of q_proj.weight, rows 8 i to + 7 of k_proj.weight "
        "and v_proj.weight, columns 16 i to + 15 of o_proj.weight; 2 units"
    )
    assert str(neurons) == (
        "neuron i of model.layers.0.mlp: row i of gate_proj.weight and up_proj.weight, column i of down_proj.weight; "
        "48 units"
    )


@pytest.mark.parametrize(
    ("name", "heads", "neurons"),
    [
        ("phi3", "rows 16 i to + 15, 8 i + 32 to + 39 and 8 i + 48 to + 55 of qkv_proj.weight, columns 16 i to + 15 of "
         "o_proj.weight", "rows i and i + 48 of gate_up_proj.weight, column i of down_proj.weight"),
        ("gpt_neox", "rows 24 i to + 23 of query_key_value.weight", "row i of dense_h_to_4h.weight"),
        ("gpt2", "columns 8 i to + 7, 8 i + 32 to + 39 and 8 i + 64 to + 71 of c_attn.weight, rows 8 i to + 7 of "
         "c_proj.weight", "column i of c_fc.weight, entry i of c_fc.bias, row i of c_proj.weight"),
    ],
)  # fmt: skip
def test_a_sentence_has_the_names_and_the_indices_that_the_model_stores(name: str, heads: str, neurons: str) -> None:
    groups = Dependencies(lifted(name)).groups
    assert heads in str(next(group for group in groups if group.kind is Kind.KV_HEAD))
    assert neurons in str(next(group for group in groups if group.kind is Kind.NEURON))


@pytest.mark.parametrize("name", ["phi3", "gpt_neox", "gpt2"])
def test_what_a_sentence_names_is_what_goes(name: str) -> None:
    original, program = model(name), lifted(name)
    heads = next(group for group in Dependencies(program).groups if group.kind is Kind.KV_HEAD)
    for member in heads.members:
        base = original.state_dict()[member.told.weight]
        axis = {"entry": 0, "row": 0, "column": 1}[member.told.what]
        marked = torch.zeros_like(base)
        marked.movedim(axis, 0)[member.told.unit == 1] = 1.0
        part = program.facts.parts.get(member.weight)
        ours = marked if part is None else part.take(marked)
        assert bool(ours.movedim(member.dim, 0)[member.unit == 1].all())
        assert ours.sum() == marked.sum()


def test_query_heads_are_one_of_every_kv_head() -> None:
    queries = Dependencies(lifted("llama"), "query").groups[0]
    assert queries.kind is Kind.QUERY_HEAD
    assert "rows 8 i to + 7 and 8 i + 16 to + 23 of q_proj.weight" in str(queries)


@pytest.mark.parametrize("form", ['"int8"', '"int4", group_size=8', '"int3", group_size=8', '"nf4", group_size=8'])
def test_quantised_weights_lose_whole_groups(form: str) -> None:
    weights, _, group_size = form.replace('"', "").partition(", group_size=")
    original = lifted("llama")
    quantize = Quantize(weights, group_size=int(group_size) if group_size else None, method="rtn")  # type: ignore[call-arg]
    quantize.run(original, Context())
    original.clean()
    found = Dependencies(original)
    neurons = next(group for group in found.groups if group.kind is Kind.NEURON)
    assert neurons.units == (48 // 8 if group_size else 48)
    check_removal(original)


# -- programs by hand --------------------------------------------------------------------------------------------------


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape)


def test_fused_weights_are_followed_through_split_and_cat() -> None:
    original = program(
        """
        fused = aten.linear.default(x, weights["qkv"])
        split = aten.split_with_sizes.default(fused, [16, 8, 8], -1)
        a = split[0]
        b = split[1]
        c = split[2]
        q = aten.reshape.default(a, [2, 3, 4, 4])
        k = aten.reshape.default(b, [2, 3, 2, 4])
        v = aten.reshape.default(c, [2, 3, 2, 4])
        qt = aten.transpose.int(q, 1, 2)
        kt = aten.transpose.int(k, 1, 2)
        vt = aten.transpose.int(v, 1, 2)
        attention = slim.attention.default(qt, kt, vt, layer=0, scale=0.5)
        at = aten.transpose.int(attention, 1, 2)
        ar = aten.reshape.default(at, [2, 3, 16])
        o = aten.linear.default(ar, weights["o"])
        both = aten.linear.default(o, weights["gate_up"])
        chunk = aten.split.Tensor(both, 6, -1)
        gate = chunk[0]
        up = chunk[1]
        silu = aten.silu.default(gate)
        h = aten.mul.Tensor(silu, up)
        y = aten.linear.default(h, weights["down"])
        return (y,)
        """,
        {"qkv": random(32, 8), "o": random(8, 16), "gate_up": random(12, 8), "down": random(8, 6)},
        inputs="x: f32[2, 3, 8]",
    )
    groups = Dependencies(original).groups
    assert [(group.kind, group.units) for group in groups] == [(Kind.KV_HEAD, 2), (Kind.RANK, 8), (Kind.NEURON, 6)]
    assert "rows 8 i to + 7, 4 i + 16 to + 19 and 4 i + 24 to + 27 of qkv" in str(groups[0])
    check_removal(original)


def test_low_rank_pairs_and_pivot_rows_are_followed() -> None:
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    original = program(
        """
        low = aten.linear.default(x, weights["b"])
        gate = aten.linear.default(low, weights["a"])
        pivots = aten.linear.default(x, weights["rows"])
        rest = aten.linear.default(pivots, weights["coefficients"])
        all = aten.cat.default([pivots, rest], -1)
        up = aten.index_select.default(all, -1, weights["order"])
        silu = aten.silu.default(gate)
        h = aten.mul.Tensor(silu, up)
        y = aten.linear.default(h, weights["down"])
        return (y,)
        """,
        {
            "b": random(3, 8), "a": random(6, 3), "rows": random(4, 8), "coefficients": random(2, 4), "order": order,
            "down": random(8, 6),
        },
    )  # fmt: skip
    kinds = [(group.kind, group.units) for group in Dependencies(original).groups]
    # Those with a row among the pivots, and the others.
    assert sorted(kinds) == [(Kind.NEURON, 2), (Kind.NEURON, 4), (Kind.RANK, 3)]
    check_removal(original, "kv", Kind.NEURON)
    check_removal(original, "kv", Kind.RANK)


def test_what_is_a_result_or_normed_stays() -> None:
    original = program(
        """
        h = aten.linear.default(x, weights["in"])
        r = aten.relu.default(h)
        n = slim.rms_norm.default(r, None, eps=1e-06)
        y = aten.linear.default(n, weights["out"])
        return (y,)
        """,
        {"in": random(12, 8), "out": random(8, 12)},
    )
    found = Dependencies(original)
    assert not found.groups
    assert ("out", "a norm averages over it", Kind.NEURON) in found.skipped


def test_a_weight_that_is_read_twice_loses_the_same_everywhere() -> None:
    original = program(
        """
        h = aten.linear.default(x, weights["in"])
        r = aten.relu.default(h)
        y = aten.linear.default(r, weights["out"])
        h2 = aten.linear.default(y, weights["in"])
        r2 = aten.tanh.default(h2)
        y2 = aten.linear.default(r2, weights["other"])
        return (y2,)
        """,
        {"in": random(12, 8), "out": random(8, 12), "other": random(8, 12)},
    )
    groups = Dependencies(original).groups
    assert [member.weight for member in groups[0].members] == ["in", "out", "other"]
    check_removal(original, "kv", Kind.NEURON)


def test_one_unit_at_least_is_left() -> None:
    found = Dependencies(lifted("llama"))
    with pytest.raises(errors.BadInput, match=r"no kv head of .* would be left"):
        found.remove({found.groups[0]: [0, 1]})


def test_units_can_be_taken_out_one_after_the_other() -> None:
    original = lifted("llama")
    at_once, in_turn = original.copy(), original.copy()
    first, second = Dependencies(at_once), Dependencies(in_turn)
    first.remove({group: [0, 1] if group.kind is Kind.NEURON else [0] for group in first.groups})
    for group in second.groups:
        second.remove({group: [0]})
        if group.kind is Kind.NEURON:
            second.remove({group: [1]})
            assert second.left(group).tolist() == list(range(2, 48))
    assert all(torch.equal(at_once.weights[name], in_turn.weights[name]) for name in at_once.weights)
    verify(in_turn, "removal")


@settings(max_examples=25, deadline=None)
@given(data=st.data(), widths=st.lists(st.integers(2, 9), min_size=1, max_size=3))
def test_any_neurons_between_linears_can_be_taken_out(data: st.DataObject, widths: list[int]) -> None:
    sizes, lines = [8, *widths, 4], ["h0 = aten.relu.default(x)"]
    for i in range(len(sizes) - 1):
        lines += [f'y{i} = aten.linear.default(h{i}, weights["w{i}"])', f"h{i + 1} = aten.gelu.default(y{i})"]
    weights = {f"w{i}": random(b, a) for i, (a, b) in enumerate(itertools.pairwise(sizes))}
    original = program("\n".join([*lines, f"return (h{len(sizes) - 1},)"]), weights)
    smaller = original.copy()
    found = Dependencies(smaller)
    assert [group.units for group in found.groups] == widths
    units = {
        group: sorted(data.draw(st.sets(st.integers(0, group.units - 1), max_size=group.units - 1)))
        for group in found.groups
    }
    expected = zeroed(original, units)
    found.remove(units)
    verify(smaller, "removal")
    probe = make_probe(original)
    assert probe.error(probe.run(expected), probe.run(smaller)) < 1e-5
