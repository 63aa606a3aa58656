"""A probe is the same each time, fits any Program, and measures real tokens only."""

import pytest
import torch

from slim.compiler.probe import PADS, ROWS, TOKENS, make_probe, rounding_noise, tolerance
from tests.programs import lifted, program

LM = "input_ids: i64[B, S], attention_mask: i64[B, S], position_ids: i64[B, S]"
EMBED = "e = aten.embedding.default(weights['e'], input_ids)\n"


def language_model(lines="return (e,)", kind="causal_lm", rows=50):
    return program(EMBED + lines, {"e": torch.randn(rows, 8)}, LM, kind=kind)


def test_the_same_seed_gives_the_same_probe_and_another_one_another():
    made = language_model()
    first, again, other = make_probe(made), make_probe(made), make_probe(made, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(first.inputs, again.inputs, strict=True))
    assert not torch.equal(first.inputs[0], other.inputs[0])


def test_a_language_model_gets_two_rows_one_of_them_left_padded():
    tokens, mask, positions = make_probe(language_model()).inputs
    assert tokens.shape == mask.shape == positions.shape == (ROWS, TOKENS)
    assert mask[0].tolist() == [0] * PADS + [1] * (TOKENS - PADS)
    assert mask[1].all()
    assert positions[0, PADS:].tolist() == list(range(TOKENS - PADS))
    assert positions[1].tolist() == list(range(TOKENS))


def test_an_encoder_is_padded_on_the_right():
    _, mask, _ = make_probe(language_model(kind="encoder")).inputs
    assert mask[0].tolist() == [1] * (TOKENS - PADS) + [0] * PADS


def test_tokens_stay_inside_the_vocabulary():
    assert make_probe(language_model(rows=3)).inputs[0].unique().tolist() == [0, 1, 2]


def test_only_real_tokens_count():
    probe = make_probe(language_model())
    a = torch.randn(ROWS, TOKENS, 8)
    b = a.clone()
    b[0, :PADS] += 100
    assert probe.error((a,), (b,)) == 0.0
    b[0, PADS] += 1
    assert probe.error((a,), (b,)) == pytest.approx(1 / float(a[probe.real].abs().max()))


def test_results_that_are_not_by_token_count_whole_even_where_sizes_agree():
    made = language_model("p = aten.slice.Tensor(weights['p'], 0, 0, 2)\nreturn (e, p)".replace("weights['p']", "e"))
    probe = make_probe(made)
    assert probe.by_token == (True, False)


def test_the_error_is_the_worst_of_all_outputs_each_by_its_own_size():
    probe = make_probe(program("return (x, x)", {}))
    x = torch.ones(2, 13, 8)
    assert probe.error((x, 10 * x), (x, 11 * x)) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("before", "after", "error"),
    [
        ([0.0, 0.0], [0.0, 0.0], 0.0),
        ([0.0, 0.0], [0.0, 1.0], float("inf")),
        ([1.0, float("-inf")], [1.0, float("-inf")], 0.0),
        ([1.0, 2.0], [1.0, float("nan")], float("inf")),
        ([1.0, float("nan")], [1.0, 2.0], float("inf")),
        ([], [], 0.0),
    ],
)
def test_numbers_that_are_not_finite_must_be_so_in_both(before, after, error):
    probe = make_probe(program("return (x,)", {}))
    assert probe.error((torch.tensor(before),), (torch.tensor(after),)) == error


def test_integers_and_sizes_must_be_equal():
    probe = make_probe(program("return (x,)", {}))
    assert probe.error((torch.tensor([1]),), (torch.tensor([1]),)) == 0.0
    assert probe.error((torch.tensor([1]),), (torch.tensor([2]),)) == float("inf")
    assert probe.error((3,), (4,)) == float("inf")


def test_an_example_takes_the_place_of_random_inputs():
    example = torch.full((1, 2, 8), 3.0)
    assert make_probe(program("return (x,)", {}), [example]).inputs[0] is example


def test_a_narrow_type_is_allowed_as_many_roundings():
    wide, narrow = (program("y = aten.add.Tensor(x, weights['w'])\nreturn (y,)", {"w": torch.ones(8, dtype=d)})
                    for d in (torch.float32, torch.bfloat16))  # fmt: skip
    assert tolerance(wide) == 1e-5
    assert tolerance(narrow) == 8 * 2**-7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_noise_is_of_the_size_of_a_rounding_in_a_well_conditioned_program(dtype):
    short = {torch.float32: "f32", torch.bfloat16: "bf16"}[dtype]
    weights = {"w": torch.randn(6, 8).to(dtype)}
    made = program("y = aten.linear.default(x, weights['w'])\nreturn (y,)", weights, f"x: {short}[B, S, 8]")
    probe = make_probe(made)
    noise = rounding_noise(probe, made, probe.run(made))
    eps = torch.finfo(dtype).eps
    assert 0.05 * eps < noise < 8 * eps
    assert noise == rounding_noise(probe, made, probe.run(made))


def test_every_kind_of_model_has_a_probe_on_which_it_is_finite():
    for name in ("llama", "gpt2"):
        made = lifted(name)
        probe = make_probe(made)
        (logits, *_) = probe.run(made)
        assert logits.shape == (ROWS, TOKENS, 96)
        assert logits.isfinite().all()
        assert probe.by_token[0]
