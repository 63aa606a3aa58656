"""IR text runs, reads back as the same Program, and is never executed on the way."""

import functools
import math
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx

from benchmarks import zoo
from slim import errors
from slim.compiler.lift import lift
from slim.compiler.program import Facts
from slim.compiler.text import HEADER, parse
from slim.compiler.verify import verify
from slim.compiler.weights import Weights
from tests.compiled import check_golden
from tests.programs import lifted, program

ROOT = Path(__file__).resolve().parents[2]


def executed(text):
    """``forward`` of the text, as Python runs it."""
    scope = {}
    exec(compile(text, "<ir>", "exec"), scope)
    return scope["forward"]


def reread(made):
    return parse(str(made), made.weights, made.facts)


def same_nodes(a, b):
    """Node by node; a weight is the same by its name in the Program, whatever its node is called."""

    def spelled(made):
        show = functools.partial(fx.map_arg, fn=lambda n: f"weight {n.target}" if n.op == "get_attr" else n.name)
        return [(n.op, n.name, n.target, show(n.args), show(n.kwargs), n.meta.get("module"), n.meta.get("where"))
                for n in made.graph.nodes if n.op in ("placeholder", "call_function")]  # fmt: skip

    assert spelled(a) == spelled(b)


# -- the round trip ----------------------------------------------------------------------------------------------------

MODELS = ["llama", "gpt2", "mixtral"]
GOLDEN = [*MODELS, "qwen2", "qwen3", "gemma", "phi3", "gpt_neox", "opt", "bert"]


@functools.cache
def golden(name):
    """A model of each architecture, of one layer or two: its IR is in tests/golden."""
    if name in MODELS:
        return lifted(name)
    return lift(zoo.build_encoder(name) if name in zoo.ENCODERS else zoo.build(name))


@pytest.mark.parametrize("name", GOLDEN)
def test_a_lifted_model_reads_back_as_itself(name):
    made = golden(name)
    again = reread(made)
    assert str(again) == str(made)
    same_nodes(again, made)
    assert again.inputs == made.inputs
    verify(again, "text")


@pytest.mark.parametrize("name", MODELS)
def test_the_text_of_a_model_runs_as_python_and_gives_the_same_numbers(name):
    made = lifted(name)
    tokens = torch.randint(0, 96, (2, 7))
    known = {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "position_ids": torch.arange(7).repeat(2, 1),
    }
    inputs = [known[value.name] for value in made.inputs]
    with torch.no_grad():
        found = executed(str(made))(made.weights, *inputs)
    for a, b in zip(found, made.run(*inputs), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(reread(made).run(*inputs), made.run(*inputs), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", GOLDEN)
def test_the_text_of_a_model_is_the_golden_one(name):
    check_golden(f"{name}.py", str(golden(name)))


def test_nothing_of_this_machine_is_in_the_text():
    text = str(lifted("llama"))
    assert str(ROOT) not in text
    assert "site-packages" not in text


def test_each_line_says_its_type_and_where_it_came_from():
    line = next(line for line in str(lifted("llama")).splitlines() if "layers.0.mlp.gate_proj" in line)
    assert ": f32[B, S, 48] = aten.linear.default(" in line
    assert re.search(r"# model\.layers\.0\.mlp\.gate_proj @ transformers/models/llama/modeling_llama\.py:\d+$", line)


@pytest.mark.parametrize(
    "literal",
    [
        0.1, 1e-300, -2.5, math.inf, -math.inf, 3, -7, True,
    ],
)  # fmt: skip
def test_a_number_reads_back_as_the_number_it_is(literal):
    made = program(f"y = aten.mul.Tensor(x, {literal!r})\nreturn (y,)", {})
    again = next(iter(reread(made).nodes()))
    assert repr(again.args[1]) == repr(literal)
    assert str(reread(made)) == str(made)


def test_not_a_number_reads_back():
    made = program("y = aten.mul.Tensor(x, nan)\nreturn (y,)", {})
    assert math.isnan(next(iter(reread(made).nodes())).args[1])


@pytest.mark.parametrize(
    "line",
    [
        "y = aten.to.dtype(x, torch.bfloat16)",
        "y = aten.clone.default(x, memory_format=torch.contiguous_format)",
        "y = aten.full.default([2, 3], 1.5, dtype=torch.float32, device=torch.device('cpu'), pin_memory=False)",
        "y = aten.gelu.default(x, approximate='tanh')",
        "y = aten.mean.dim(x, [-1], True)",
        "y = aten.sum.dim_IntList(x, [0, 1])",
        "y = aten.clamp.default(x, None, 1.0)",
        "n = aten.sym_size.int(x, 1)\nm = operator.add(n, 1)\ny = aten.arange.default(m, device=torch.device('cpu'))",
        "n = aten.sym_size.int(x, 0)\nm = torch.sym_max(n, 3)\ny = aten.zeros.default([m, n])",
        "s = aten.split.Tensor(x, 4, -1)\ny = s[1]",
        "y = aten.einsum.default('abc,abd->acd', [x, x])",
    ],
)
def test_every_kind_of_argument_reads_back(line):
    made = program(f"{line}\nreturn (y,)", {})
    assert str(reread(made)) == str(made)
    same_nodes(reread(made), made)
    x = torch.randn(2, 3, 8)
    assert torch.equal(executed(str(made))(made.weights, x)[0], made.run(x)[0])


@pytest.mark.parametrize("name", ['a"]; b["c', "back\\slash", "new\nline", "übung.重み", "a.b.0.weight", "it's", "😀"])
def test_any_weight_name_reads_back(name):
    made = program(f"y = aten.add.Tensor(x, weights[{name!r}])\nreturn (y,)", {name: torch.ones(8)})
    assert list(made.weights) == [name]
    assert str(reread(made)) == str(made)
    executed(str(made))(made.weights, torch.zeros(1, 1, 8))


def test_the_order_in_which_weights_are_read_does_not_change_the_text():
    line = "y = aten.linear.default(x, weights['b'], weights['a'])\nz = aten.add.Tensor(y, weights['a'])\nreturn (z,)"
    made = program(line, {"a": torch.ones(8), "b": torch.ones(8, 8)})
    assert str(reread(reread(made))) == str(made)


def test_an_input_that_is_called_as_the_text_calls_something_else_gets_a_number():
    class Scaled(torch.nn.Module):
        def forward(self, weights, aten, weights_1, slim):
            return weights * aten + weights_1 / slim

    examples = tuple(torch.full((2, 3), float(number)) for number in (1, 2, 3, 4))
    made = lift(Scaled(), examples)
    assert [value.name for value in made.inputs] == ["weights_2", "aten_1", "weights_1", "slim_1"]
    same_nodes(reread(made), made)
    assert float(executed(str(made))(made.weights, *examples)[0][0, 0]) == 2.75


def test_inputs_of_no_dimension_read_back():
    made = program("y = aten.add.Tensor(x, k)\nreturn (y, k)", {}, inputs="x: f32[B, 8], k: f32[()]")
    assert made.inputs[1].shape == ()
    assert str(reread(made)) == str(made)


# -- random programs ---------------------------------------------------------------------------------------------------

UNARY = {"relu": torch.relu, "tanh": torch.tanh, "neg": torch.neg, "sigmoid": torch.sigmoid, "abs": torch.abs}
BINARY = {"add": torch.add, "sub": torch.sub, "mul": torch.mul, "maximum": torch.maximum}
SCALARS = st.one_of(st.integers(-3, 3), st.floats(-2, 2, allow_nan=False, width=32))


@st.composite
def random_programs(draw):
    """(lines, weights, the same computation as a Python function): values are [B, S, 8], weights [8, 8] and [8]."""
    weights, lines, steps, names = {}, [], [], ["x"]
    for index in range(draw(st.integers(1, 9))):
        name, kind = (
            f"v{index}",
            draw(st.sampled_from(["unary", "binary", "scalar", "linear", "biased", "matmul", "shift"])),
        )
        a, b = draw(st.sampled_from(names)), draw(st.sampled_from(names))
        if kind == "unary":
            op = draw(st.sampled_from(sorted(UNARY)))
            line, step = f"aten.{op}.default({a})", functools.partial(lambda v, f, a: f(v[a]), f=UNARY[op], a=a)
        elif kind == "binary":
            op = draw(st.sampled_from(sorted(BINARY)))
            overload = "default" if op == "maximum" else "Tensor"
            line, step = f"aten.{op}.{overload}({a}, {b})", functools.partial(
                lambda v, f, a, b: f(v[a], v[b]), f=BINARY[op], a=a, b=b)  # fmt: skip
        elif kind == "scalar":
            number = draw(SCALARS)
            line, step = f"aten.mul.Tensor({a}, {number!r})", functools.partial(lambda v, a, n: v[a] * n, a=a, n=number)
        elif kind == "matmul":
            line, step = f"aten.transpose.int({a}, 1, 2)", None
            lines.append(f"t{index}: any = {line}")
            lines.append(f"p{index}: any = aten.matmul.default(t{index}, {b})")
            line, step = f"aten.matmul.default({a}, p{index})", functools.partial(
                lambda v, a, b: torch.tanh(v[a] @ (v[a].transpose(1, 2) @ v[b])), a=a, b=b)  # fmt: skip
            lines.append(f"m{index}: any = {line}")
            line = f"aten.tanh.default(m{index})"
        elif kind == "shift":
            weights[f"shift.{index}"] = w = torch.randn(8)
            line, step = f'aten.add.Tensor({a}, weights["shift.{index}"])', functools.partial(
                lambda v, a, w: v[a] + w, a=a, w=w)  # fmt: skip
        else:
            weights[f"w.{index}"] = w = torch.randn(8, 8) / 3
            weights[f"b.{index}"] = bias = torch.randn(8) if kind == "biased" else None
            more = f', weights["b.{index}"]' if kind == "biased" else ""
            line, step = f'aten.linear.default({a}, weights["w.{index}"]{more})', functools.partial(
                lambda v, a, w, bias: torch.nn.functional.linear(v[a], w, bias), a=a, w=w, bias=bias)  # fmt: skip
        lines.append(f"{name}: any = {line}")
        steps.append((name, step))
        names.append(name)
    return lines, {k: w for k, w in weights.items() if w is not None}, steps


@settings(max_examples=30, deadline=None)
@given(random_programs(), st.integers(1, 3), st.integers(1, 5))
def test_a_random_program_runs_as_torch_does_and_reads_back(case, batch, length):
    lines, weights, steps = case
    body = "\n".join(f"    {line}" for line in [*lines, f"return ({steps[-1][0]}, {steps[0][0]})"])
    made = parse(f"{HEADER}: random\n\ndef forward(weights, x: f32[B, S, 8]):\n{body}\n", Weights(weights))
    verify(made, "parse")
    x = torch.randn(batch, length, 8)
    values = {"x": x}
    for name, step in steps:
        values[name] = step(values)
    found = made.run(x)
    torch.testing.assert_close(found, (values[steps[-1][0]], values[steps[0][0]]))
    text = str(made)
    assert str(reread(made)) == text
    with torch.no_grad():
        ran = executed(text)(made.weights, x)
        compiled = made.module()(x)
    assert all(torch.equal(a, b) for a, b in zip(ran, found, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(compiled, found, strict=True))


# -- what is refused ---------------------------------------------------------------------------------------------------


def text_of(*lines, header=f"{HEADER}: bad", inputs="x: f32[B, S, 8]", before=""):
    body = "\n".join(f"    {line}" for line in lines)
    return f"{header}\n{before}\ndef forward(weights, {inputs}):\n{body}\n"


def refused(text, weights=None):
    with pytest.raises(errors.BadIR) as caught:
        parse(text, Weights(weights or {}), Facts())
    return caught.value


RETURN = "return (x,)"


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("f32[B, S, 16]", "f32[B, S, 8]"), ("f16[B, S, 8]", "f32[B, S, 8]"), ("f32[S, B, 8]", "f32[B, S, 8]"),
        ("f32[B, 8]", "f32[B, S, 8]"), ("int", "f32[B, S, 8]"), ("tuple[f32[B, S, 8]]", "f32[B, S, 8]"),
        ("f32[B, S + 1, 7]", "f32[B, S, 8]"),
    ],
)  # fmt: skip
def test_a_type_that_the_operation_does_not_have_is_refused_with_the_one_that_it_has(wrong, right):
    error = refused(text_of(f"y: {wrong} = aten.relu.default(x)", "return (y,)"))
    assert f"y is {right}, and not {wrong}" in str(error)
    parse(text_of(f"y: {right} = aten.relu.default(x)", "return (y,)"), Weights({}), Facts())


def test_a_type_of_several_or_of_a_formula_is_read():
    lines = ["y: tuple[f32[B, S, 4], f32[B, S, 4]] = aten.split.Tensor(x, 4, -1)", "a: f32[B, S, 4] = y[0]"]
    more = ["z: f32[S*B, 4] = aten.reshape.default(a, [-1, 4])", "return (z,)"]  # printed as B*S
    parse(text_of(*lines, *more), Weights({}), Facts())
    error = refused(text_of(lines[0].replace("4], f32", "3], f32"), *lines[1:], *more))
    assert "y is tuple[f32[B, S, 4], f32[B, S, 4]], and not" in str(error)


@pytest.mark.parametrize(
    "expression",
    [
        "__import__('pathlib').Path('{file}').touch()",
        "(lambda: open('{file}', 'w'))()",
        "aten.relu.default(open('{file}', 'w'))",
        "aten.relu.default(x, out=open('{file}', 'w'))",
        "[open('{file}', 'w') for _ in (1,)]",
        "aten.relu.default([open('{file}', 'w') for _ in (1,)])",
        "aten.relu.default(x) if open('{file}', 'w') else x",
        "(y := open('{file}', 'w'))",
        'aten.relu.default(f\'{{open("{file}", "w")}}\')',
        "x[open('{file}', 'w')]",
        "weights[open('{file}', 'w')]",
        "torch.save(x, '{file}')",
        "torch.ops.aten.save.default(x, '{file}')",
        "aten.save.default(x, '{file}')",
        "aten.from_file.default('{file}', True, 10)",
        "torch.serialization.os.system('touch {file}')",
        "torch.device(open('{file}', 'w'))",
        "operator.methodcaller('touch')(x)",
        "aten.relu.default.__class__.__base__.__subclasses__()",
        "aten.__class__.mro()",
        "aten.__dict__.clear()",
        "aten.relu.__dict__.clear()",
        "slim.__dict__.clear()",
        "slim.attention.__init__()",
        "aten.relu.default(*[x])",
        "aten.relu.default(**{{'self': x}})",
        "aten.relu_.default(x)",
        "aten.add_.Tensor(x, x)",
        "aten.relu.out(x, out=x)",
        "print('{file}')",
        "x.tolist()",
        "x",
        "3",
    ],
)
def test_a_malicious_expression_is_refused_and_nothing_of_it_runs(expression, tmp_path):
    file = tmp_path / "touched"
    error = refused(text_of(f"y: any = {expression.format(file=file)}", "return (y,)"))
    assert error.line == 4
    assert not file.exists()
    assert torch.ops.aten.relu.default(torch.tensor(-1.0)) == 0  # torch.ops is what it was
    torch.ops.slim.rms_norm(torch.ones(2, 4), None, eps=1e-6)


@pytest.mark.parametrize(
    "statement",
    ["import os", "x.y: any = aten.relu.default(x)", "y = aten.relu.default(x)", "aten.relu.default(x)", "del x",
     "pass",
     "for i in x: pass", "while True: pass", "y: any", "exec('1')", "assert open('f')", "global os", "x += 1",
     "def g(): pass", "class C: pass", "async def g(): pass", "return", "y, z = x"],
)  # fmt: skip
def test_any_other_statement_is_refused(statement):
    assert refused(text_of(statement, RETURN)).line == 4


def test_what_stands_around_forward_is_never_run(tmp_path):
    file = tmp_path / "touched"
    before = f"open({str(file)!r}, 'w')\nclass torch: ops = open({str(file)!r}, 'w')\n"
    made = parse(text_of("y: any = aten.relu.default(x)", "return (y,)", before=before), Weights({}))
    assert next(iter(made.nodes())).target is torch.ops.aten.relu.default
    assert not file.exists()


@pytest.mark.parametrize(
    "inputs",
    ["x", "x: f32", "x: f33[B]", "x: open('f')[B]", "x: f32[B + 1]", "x: f32[-1]", "x: f32['B']", "x: f32[1.5, (2, 3)]",
     "*x", "**x", "x: f32[B] = 1", "*, x: f32[B]", "x: f32[B], /"],
)  # fmt: skip
def test_an_input_without_a_readable_type_is_refused(inputs):
    refused(text_of(RETURN, inputs=inputs))


def test_the_first_argument_is_the_weights():
    refused(text_of(RETURN).replace("weights, ", "other, "))


@pytest.mark.parametrize("header", ["", "# slim IR 2: later", "# slim IR 10: much later", "import os", "#slim IR 1"])
def test_a_text_of_another_version_is_refused(header):
    error = refused(text_of(RETURN, header=header))
    assert error.line == 1
    assert "slim IR 1" in str(error)


@pytest.mark.parametrize("text", ["def forward(weights, x: f32[B]:", "y = (", "\0", "-" * 20000 + "1", "(" * 500])
def test_what_is_not_python_is_refused(text):
    refused(f"{HEADER}: bad\n{text}\n")


def test_a_text_without_forward_is_refused():
    assert "forward" in str(refused(f"{HEADER}: bad\n"))


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("y: any = aten.no_such_op.default(x)", "aten.no_such_op.default is not an operation of the dialect"),
        ("y: any = aten.relu.no_such_overload(x)", "not an operation of the dialect"),
        ("y: any = prims.add.default(x, x)", "not an operation of the dialect"),
        ('y: any = aten.add.Tensor(x, weights["gone"])', "there is no weight 'gone'"),
        ("y: any = aten.add.Tensor(x, z)", "'z'"),
        ("y: any = aten.matmul.default(x, x)", "8"),
        ("y: any = aten.relu.default(x, x)", ""),
        ("y: any = aten.mul.Tensor(x, 2 ** 3)", ""),
        ("y: any = aten.to.dtype(x, torch.float33)", "float33"),
        ("y: any = aten.to.dtype(x, torch.load)", "torch.load is not a dtype"),
        ("x: any = aten.relu.default(x)", "x has a value already"),
    ],
)
def test_a_line_that_means_nothing_is_refused_with_its_number_and_the_reason(line, reason):
    error = refused(text_of("w: any = aten.relu.default(x)", line, RETURN))
    assert error.line == 5
    assert str(error).startswith("line 5 is not slim IR: ")
    assert reason in str(error)


def test_a_function_that_returns_nothing_or_goes_on_after_it_is_refused():
    assert "returns nothing" in str(refused(text_of("y: any = aten.relu.default(x)")))
    assert "after `return`" in str(refused(text_of(RETURN, "y: any = aten.relu.default(x)")))
    assert "after `return`" in str(refused(text_of(RETURN, RETURN)))


def test_a_weight_of_another_shape_is_found_while_reading():
    text = text_of('y: any = aten.linear.default(x, weights["w"])', "return (y,)")
    parse(text, Weights({"w": torch.ones(4, 8)}))
    refused(text, {"w": torch.ones(4, 9)})


DAMAGED = """\
n: any = aten.sym_size.int(x, 1)
h: any = slim.rms_norm.default(x, weights["norm"], eps=1e-06)  # layers.0 @ model.py:12
q: any = aten.linear.default(h, weights["q"])
r: any = aten.reshape.default(q, [-1, n, 2, 4])
t: any = aten.transpose.int(r, 1, 2)
a: any = slim.attention.default(t, t, t, layer=0, scale=0.5)
y: any = aten.to.dtype(a, torch.bfloat16)
return (y, h)"""


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_damaged_text_is_refused_or_a_program_but_never_another_error(data):
    weights = Weights({"norm": torch.ones(8), "q": torch.ones(8, 8)})
    text = text_of(*DAMAGED.splitlines())
    start = data.draw(st.integers(0, len(text)))
    stop = data.draw(st.integers(start, min(len(text), start + 30)))
    patch = data.draw(st.sampled_from(["", "(", ")", ",", "x", "0", "\n", "[", "None", ": ", '"', "-1", "#", "]", " "]))
    try:
        made = parse(text[:start] + patch + text[stop:], weights)
    except errors.BadIR:
        return
    assert str(reread(made)) == str(made)
