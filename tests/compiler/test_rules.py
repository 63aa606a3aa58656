"""Rules match what their patterns say, count what they did, and say why they did not."""

import operator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slim.compiler.rules import Count, Either, Literal, NearMiss, Rule, Through, Var, argument, call, rewrite
from slim.compiler.verify import verify
from tests.programs import program

aten = torch.ops.aten


def run(made):
    torch.manual_seed(1)
    return made.run(torch.randn(2, 3, 8))[0]


def targets(made):
    return [node.target for node in made.nodes()]


def only(made, target):
    (node,) = made.nodes(target)
    return node


def matches(pattern, node):
    return list(pattern.match(node, {}))


def root(lines, **weights):
    """The node that the program of ``lines`` returns."""
    return program(lines, weights).graph.output_node().args[0][0]


def to_relu(m):
    return m.new(aten.relu.default, m["x"])


# -- patterns ----------------------------------------------------------------------------------------------------------


def test_a_name_binds_the_argument_in_its_place():
    node = root("y = aten.relu.default(x)\nz = aten.sub.Tensor(y, x)\nreturn (z,)")
    (bound,) = matches(call(aten.sub.Tensor, args=("a", "b")), node)
    assert (bound["a"].name, bound["b"].name) == ("y", "x")


def test_the_same_name_is_the_same_value():
    square = call(aten.mul.Tensor, args=("x", "x"))
    assert matches(square, root("y = aten.mul.Tensor(x, x)\nreturn (y,)"))
    assert not matches(square, root("y = aten.relu.default(x)\nz = aten.mul.Tensor(x, y)\nreturn (z,)"))
    # two nodes that compute the same are two values, until they are shared
    twice = root("y = aten.relu.default(x)\nz = aten.relu.default(x)\nw = aten.mul.Tensor(y, z)\nreturn (w,)")
    assert not matches(square, twice)


def test_operands_commute_only_where_the_pattern_says_so():
    line = "y = aten.relu.default(x)\nz = aten.add.Tensor(x, y)\nreturn (z,)"
    relu = call(aten.relu.default, args=("x",))
    assert not matches(call(aten.add.Tensor, args=(relu, "rest")), root(line))
    (bound,) = matches(call(aten.add.Tensor, args=(relu, "rest"), commutes=True), root(line))
    assert bound["rest"].name == "x"


def test_a_commuting_pattern_offers_both_orders():
    node = root("y = aten.relu.default(x)\nz = aten.mul.Tensor(x, y)\nreturn (z,)")
    found = matches(call(aten.mul.Tensor, args=("a", "b"), commutes=True), node)
    assert [(b["a"].name, b["b"].name) for b in found] == [("x", "y"), ("y", "x")]


def test_defaults_of_the_schema_are_arguments_too():
    node = root("y = aten.add.Tensor(x, 2)\nreturn (y,)")
    assert argument(node, "alpha") == 1
    assert matches(call(aten.add.Tensor, args=("x",), alpha=1), node)
    assert not matches(call(aten.add.Tensor, args=("x",), alpha=2), node)
    said = root("y = aten.add.Tensor(x, x, alpha=2)\nreturn (y,)")
    assert matches(call(aten.add.Tensor, args=("x",), alpha=2), said)


def test_a_keyword_pattern_may_stand_for_a_positional_argument():
    node = root("y = aten.transpose.int(x, 1, 2)\nreturn (y,)")
    assert matches(call(aten.transpose.int, args=("x",), dim0=1, dim1=2), node)
    assert not matches(call(aten.transpose.int, args=("x",), dim0=2, dim1=1), node)


def test_literals_and_lists_match_by_value():
    node = root("y = aten.mean.dim(x, [-1], True)\nreturn (y,)")
    assert matches(call(aten.mean.dim, args=("x", [-1], True)), node)
    assert not matches(call(aten.mean.dim, args=("x", [1], True)), node)
    assert not matches(call(aten.mean.dim, args=("x", [-1, -2], True)), node)
    assert not matches(Literal(2), node)


def test_a_test_narrows_what_a_name_takes():
    number = Var("s", lambda v: isinstance(v, float))
    scaled = call(aten.mul.Tensor, args=("x", number))
    assert matches(scaled, root("y = aten.mul.Tensor(x, 0.5)\nreturn (y,)"))
    assert not matches(scaled, root("y = aten.mul.Tensor(x, x)\nreturn (y,)"))


def test_either_tries_its_choices_in_order():
    either = Either((call(aten.relu.default, args=("x",)), call(aten.neg.default, args=("y",))))
    assert list(matches(either, root("y = aten.neg.default(x)\nreturn (y,)"))[0]) == ["y"]
    assert either.targets == {aten.relu.default, aten.neg.default}


def test_through_looks_behind_any_number_of_calls():
    seen_through = Through(frozenset({aten.neg.default}), call(aten.relu.default, args=("x",), name="relu"))
    for negations in range(4):
        lines = ["v0 = aten.relu.default(x)"] + [f"v{i + 1} = aten.neg.default(v{i})" for i in range(negations)]
        node = root("\n".join([*lines, f"return (v{negations},)"]))
        assert [b["relu"].name for b in matches(seen_through, node)] == ["v0"]
    assert not matches(seen_through, root("y = aten.tanh.default(x)\nreturn (y,)"))


def test_a_named_call_binds_its_node():
    node = root("y = aten.relu.default(x)\nz = aten.neg.default(y)\nreturn (z,)")
    (bound,) = matches(call(aten.neg.default, args=(call(aten.relu.default, args=("x",), name="inner"),)), node)
    assert bound["inner"] is node.args[0]


# -- rewriting ---------------------------------------------------------------------------------------------------------

NEG_NEG = Rule("-(-x) = x", call(aten.neg.default, args=(call(aten.neg.default, args=("x",)),)), lambda m: m["x"])


def test_a_rule_replaces_its_root_and_leaves_nothing_dead_behind():
    made = program("y = aten.neg.default(x)\nz = aten.neg.default(y)\nw = aten.relu.default(z)\nreturn (w,)", {})
    before = run(made)
    counts = rewrite(made, [NEG_NEG])
    assert targets(made) == [aten.relu.default]
    assert torch.equal(run(made), before)
    assert (counts["-(-x) = x"].tried, counts["-(-x) = x"].matched) == (2, 1)


def test_rules_are_tried_until_nothing_changes():
    lines = "\n".join(f"v{i + 1} = aten.neg.default(v{i})" for i in range(7)).replace("v0", "x")
    made = program(f"{lines}\nreturn (v7,)", {})
    counts = rewrite(made, [NEG_NEG])
    assert targets(made) == [aten.neg.default]
    assert counts["-(-x) = x"].matched == 3


def test_one_rules_result_is_anothers_pattern():
    first = Rule("tanh(x) = neg(neg(x))", call(aten.tanh.default, args=("x",)),
                 lambda m: m.new(aten.neg.default, m.new(aten.neg.default, m["x"])))  # fmt: skip
    made = program("y = aten.tanh.default(x)\nz = aten.relu.default(y)\nreturn (z,)", {})
    rewrite(made, [NEG_NEG, first])
    assert targets(made) == [aten.relu.default]


def test_the_first_rule_that_applies_wins():
    made = program("y = aten.neg.default(x)\nreturn (y,)", {})
    relu = Rule("to relu", call(aten.neg.default, args=("x",)), to_relu)
    tanh = Rule("to tanh", call(aten.neg.default, args=("x",)), lambda m: m.new(aten.tanh.default, m["x"]))
    counts = rewrite(made, [relu, tanh])
    assert targets(made) == [aten.relu.default]
    assert (counts["to relu"].matched, counts["to tanh"].tried) == (1, 0)


def test_a_rule_whose_root_never_occurs_is_counted_as_never_tried():
    counts = rewrite(program("y = aten.relu.default(x)\nreturn (y,)", {}), [NEG_NEG])
    assert counts == {"-(-x) = x": Count(tried=0, matched=0, misses=[])}


def test_counts_add_up_over_calls():
    made = program("y = aten.neg.default(x)\nz = aten.neg.default(y)\nreturn (z,)", {})
    counts = rewrite(made.copy(), [NEG_NEG])
    rewrite(made, [NEG_NEG], counts)
    assert counts["-(-x) = x"].matched == 2


def test_what_build_declines_in_one_order_it_may_take_in_the_other():
    def build(m):
        return to_relu(m) if m["rest"].name == "x" else None

    rule = Rule("sum", call(aten.add.Tensor, args=("x", "rest"), commutes=True), build)
    made = program("y = aten.tanh.default(x)\nz = aten.add.Tensor(x, y)\nreturn (z,)", {})
    assert rewrite(made, [rule])["sum"].matched == 1
    assert only(made, aten.relu.default).args[0].target is aten.tanh.default


def test_a_near_miss_leaves_the_program_alone_and_says_why_and_where_once():
    def build(m):
        raise NearMiss("it is Tuesday")

    made = program("y = aten.neg.default(x)  # layers.0.mlp @ model.py:12\nz = aten.relu.default(y)\nreturn (z,)", {})
    made.graph.find_nodes(op="call_function", target=aten.neg.default)[0].meta.update(
        module="layers.0.mlp", where="model.py:12"
    )
    text = str(made)
    others = Rule("other", call(aten.relu.default, args=("x",)), lambda m: None)
    counts = rewrite(made, [Rule("-x", call(aten.neg.default, args=("x",)), build), others])
    assert counts["-x"].misses == ["y (layers.0.mlp model.py:12): it is Tuesday"]
    assert counts["-x"].matched == counts["other"].matched == 0
    assert str(made) == text


def test_a_rule_below_a_near_miss_still_gets_its_turn():
    def build(m):
        raise NearMiss("no")

    neg = call(aten.neg.default, args=("x",))
    made = program("y = aten.neg.default(x)\nreturn (y,)", {})
    counts = rewrite(made, [Rule("first", neg, build), Rule("second", neg, to_relu)])
    assert (counts["first"].misses, counts["second"].matched) == (["y: no"], 1)


def test_rules_that_go_round_in_a_circle_are_stopped_and_named():
    swap = Rule(
        "a + b = b + a", call(aten.add.Tensor, args=("a", "b")), lambda m: m.new(aten.add.Tensor, m["b"], m["a"])
    )
    made = program("y = aten.relu.default(x)\nz = aten.add.Tensor(x, y)\nreturn (z,)", {})
    with pytest.raises(RuntimeError, match=r"do not come to rest.*'a \+ b = b \+ a'"):
        rewrite(made, [swap])


@pytest.mark.parametrize(
    "build",
    [
        lambda m: m.new(aten.to.dtype, m["x"], torch.float64),
        lambda m: m.new(aten.unsqueeze.default, m["x"], 0),
    ],
    ids=["another dtype", "another rank"],
)
def test_a_rule_that_changes_a_type_is_a_fault_of_the_rule(build):
    made = program("y = aten.neg.default(x)\nreturn (y,)", {})
    with pytest.raises(TypeError, match="rule 'bad' turned"):
        rewrite(made, [Rule("bad", call(aten.neg.default, args=("x",)), build)])


def test_a_new_node_says_where_the_old_one_came_from():
    made = program("y = aten.neg.default(x)\nreturn (y,)", {})
    only(made, aten.neg.default).meta.update(module="layers.0", where="model.py:3")
    rewrite(made, [Rule("r", call(aten.neg.default, args=("x",)), to_relu)])
    assert only(made, aten.relu.default).meta["where"] == "model.py:3"
    assert "# layers.0 @ model.py:3" in str(made)


def test_weights_that_a_rewrite_leaves_unread_are_dropped():
    made = program("y = aten.add.Tensor(x, weights['w'])\nreturn (y,)", {"w": torch.ones(8)})
    rewrite(made, [Rule("x + w = relu(x)", call(aten.add.Tensor, args=("x", "w")), to_relu)])
    assert list(made.weights) == []


# -- properties --------------------------------------------------------------------------------------------------------

IDENTITIES = (
    NEG_NEG,
    Rule("x - (-y) = x + y", call(aten.sub.Tensor, args=("x", call(aten.neg.default, args=("y",)))),
         lambda m: m.new(aten.add.Tensor, m["x"], m["y"])),
    Rule("x + (-y) = x - y",
         call(aten.add.Tensor, args=("x", call(aten.neg.default, args=("y",))), commutes=True),
         lambda m: m.new(aten.sub.Tensor, m["x"], m["y"])),
    Rule("relu(relu(x)) = relu(x)", call(aten.relu.default, args=(call(aten.relu.default, args=("x",), name="r"),)),
         lambda m: m["r"]),
    Rule("x * x = x^2", call(aten.mul.Tensor, args=("x", "x")), lambda m: m.new(aten.pow.Tensor_Scalar, m["x"], 2)),
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_rules_that_are_true_preserve_every_program(data):
    names, lines = ["x"], []
    for index in range(data.draw(st.integers(1, 12))):
        op = data.draw(st.sampled_from(["neg", "relu", "add", "sub", "mul"]))
        args = [data.draw(st.sampled_from(names[-4:])) for _ in range(1 if op in ("neg", "relu") else 2)]
        overload = "default" if len(args) == 1 else "Tensor"
        lines.append(f"v{index} = aten.{op}.{overload}({', '.join(args)})")
        names.append(f"v{index}")
    made = program("\n".join([*lines, f"return ({names[-1]}, {names[len(names) // 2]})"]), {})
    x = torch.randn(2, 3, 8, dtype=torch.float32) / 4
    before, nodes = made.run(x), len(list(made.nodes()))
    counts = rewrite(made, IDENTITIES)
    verify(made, "rules")
    for a, b in zip(made.run(x), before, strict=True):
        torch.testing.assert_close(a, b)
    assert len(list(made.nodes())) <= nodes
    assert all(count.tried >= count.matched for count in counts.values())
    assert not any(c.matched for c in rewrite(made, IDENTITIES).values())  # nothing is left to do


def test_an_operator_without_a_schema_is_no_call_a_pattern_matches():
    made = program("y = aten.split.Tensor(x, 4, -1)\nz = y[0]\nreturn (z,)", {})
    node = only(made, operator.getitem)
    assert not matches(call(aten.neg.default, args=("x",)), node)
