"""SmoothQuant keeps the function, undoes outliers whatever made them, and says what it left alone."""

import pytest
import torch

import slim
from benchmarks.outliers import PlantOutliers
from slim import errors
from slim.compiler.passes_base import Context
from slim.compiler.pipeline import run_pipeline
from slim.compiler.scaling import scale_sites
from slim.compiler.statistics import collect
from slim.passes import SmoothQuant, parse_pipeline
from slim.passes.smooth_quant import largest, rounding_errors, smoothing_scale
from tests.programs import lifted, model, program


def matrix(*shape):
    return torch.randn(*shape) * shape[-1] ** -0.5


def tokens():
    return [torch.randint(3, 96, (2, 24), generator=torch.Generator().manual_seed(s)) for s in range(3)]


def context(**options):
    return Context(calibration=tokens(), **options)


def smoothed(before, alpha=0.5):
    after, report = run_pipeline(before, [SmoothQuant(alpha)], context())
    return after, report.passes[0]


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, "search"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma", "mixtral", "qwen2"])
def test_models_keep_their_function(name, alpha):
    before = lifted(name)
    after, report = smoothed(before, alpha)
    assert report.error < 1e-5
    assert len(report.matched) == len(scale_sites(before)[0])
    changed = [n for n in before.weights if not torch.equal(before.weights[n], after.weights[n])]
    assert len(changed) >= len(report.matched)


@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_a_model_in_bfloat16_moves_no_more_than_rounding_moves_it(name):
    _, report = smoothed(lifted(name, torch.bfloat16))
    assert report.error < 6e-2


def smooth_site(x, w, alpha, dead=()):
    """The largest |x| and |w| of each channel after a norm and its two readers were smoothed."""
    x, w = x.clone(), w.clone()
    for channel in dead:
        w[:, channel] = 0
    weights = {"g": torch.ones(8), "a": w[:5], "b": w[5:]}
    before = program(
        """
        n = slim.rms_norm.default(x, weights["g"], eps=1e-6)
        a = aten.linear.default(n, weights["a"])
        b = aten.linear.default(n, weights["b"])
        return (a, b)
        """,
        weights,
        "x: f32[B, 8]",
    )
    ctx = Context(calibration=[x])
    after = before.copy()
    SmoothQuant(alpha).run(after, ctx)
    return before, after, ctx


def test_the_scale_is_that_of_the_paper_over_all_readers_but_for_a_constant():
    x, w = torch.randn(50, 8) * torch.tensor([1, 1, 30, 1, 1, 1, 0.1, 1]), matrix(9, 8)
    normal = x / x.square().mean(-1, keepdim=True).add(1e-6).sqrt()
    for alpha in (0.3, 0.8):
        _, after, _ = smooth_site(x, w, alpha)
        scale = 1 / after.weights["g"]
        expected = normal.abs().amax(0) ** alpha / w.abs().amax(0) ** (1 - alpha)
        assert torch.allclose(scale / scale[0], expected / expected[0], rtol=1e-4)
        assert (scale == 1).any()


def test_half_and_half_leaves_activations_and_weights_equally_uneven():
    x, w = torch.randn(50, 8) * torch.tensor([1, 1, 30, 1, 1, 1, 0.1, 1]), matrix(9, 8)
    normal = x / x.square().mean(-1, keepdim=True).add(1e-6).sqrt()
    _, after, _ = smooth_site(x, w, 0.5)
    in_x = (normal * after.weights["g"]).abs().amax(0)
    in_w = torch.cat([after.weights["a"], after.weights["b"]]).abs().amax(0)
    assert torch.allclose(in_x / in_x[0], in_w / in_w[0], rtol=1e-4)


def test_channels_that_are_zero_keep_their_scale_and_do_not_disturb_the_others():
    x, w = torch.randn(50, 8), matrix(9, 8)
    x[:, 2] = 0
    _, after, _ = smooth_site(x, w, 0.5, dead=(5,))
    assert after.weights["g"][2] == after.weights["g"][5] == 1
    assert torch.isfinite(after.weights["g"]).all()
    assert float(smoothing_scale(torch.zeros(3), torch.ones(3), 0.5).sum()) == 3


def test_no_channel_moves_without_bound():
    scale = smoothing_scale(torch.tensor([1e-30, 1.0, 1.0]), torch.ones(3), 1.0)
    assert scale.tolist() == pytest.approx([1e-5, 1.0, 1.0])


# -- outliers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [60.0, 1000.0])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma", "mixtral"])
def test_planting_outliers_keeps_the_function_and_plants_them(name, factor):
    before = lifted(name)
    planted, report = run_pipeline(before, [PlantOutliers(factor)], Context())
    assert report.passes[0].error < 1e-5
    norms = [site for site in scale_sites(before)[0] if site.after_norm]
    assert report.passes[0].matched == [site.name for site in norms]
    value = norms[0].values[0]
    plain = collect(before, [value], context(), asked_by="test")[value].absmax
    (site, *_) = scale_sites(planted)[0]
    ratio = collect(planted, site.values, context(), asked_by="test")[site.values[0]].absmax / plain
    assert sorted(ratio.round(decimals=2).tolist()) == pytest.approx([1.0] * 31 + [factor], rel=0.01)


@pytest.mark.parametrize("alpha", [0.5, 0.8])
def test_smoothing_undoes_what_was_planted(alpha):
    """x^a / w^(1 - a) grows by c where x does by c and w shrinks by it: nothing of the outliers is left."""
    before = lifted("llama")
    planted, _ = run_pipeline(before, [PlantOutliers(1000.0, share=0.1)], Context())
    plain, with_outliers = smoothed(before, alpha)[0], smoothed(planted, alpha)[0]
    for name in plain.weights:
        if plain.weights.dtype(name).is_floating_point:
            shape = plain.weights[name] / plain.weights[name].norm()
            assert torch.allclose(with_outliers.weights[name] / with_outliers.weights[name].norm(), shape, atol=1e-4)


# -- searching ---------------------------------------------------------------------------------------------------------


def test_the_search_finds_the_least_error_of_its_grid_at_each_site():
    before = lifted("llama")
    sites, _ = scale_sites(before)
    values = [value for site in sites for value in site.values]
    statistics = collect(before, values, context(), asked_by="test", rows=256)
    after, report = smoothed(before, "search")
    moved, _ = scale_sites(after)
    later = collect(after, [v for site in moved for v in site.values], context(), asked_by="test", rows=256)
    for site, same in zip(sites, moved, strict=True):
        x, w = largest(before, site, statistics)
        fixed = [torch.ones(site.size), smoothing_scale(x, w, 0.5), smoothing_scale(x, w, 0.9)]
        found = rounding_errors(after, same, later, [torch.ones(same.size)])
        assert float(found) <= float(rounding_errors(before, site, statistics, fixed).min()) * 1.05
    assert any(note.startswith("alpha found by search") for note in report.notes)


def test_the_search_tells_outliers_of_activations_from_those_of_weights():
    x = torch.randn(300, 8)
    outlying = x * torch.tensor([1, 1, 100, 1, 1, 1, 1, 1])
    for data in (x, outlying):
        before, after, ctx = smooth_site(data, matrix(9, 8), "search")
        (site,), _ = scale_sites(before)
        statistics = collect(before, site.values, ctx, asked_by="test", rows=256)
        as_it_was, as_found = rounding_errors(
            before, site, statistics, [torch.ones(8), before.weights["g"] / after.weights["g"]]
        ).tolist()
        assert as_found <= as_it_was
    assert as_found < as_it_was / 2


@pytest.mark.parametrize("name", ["gpt2", "gemma"])
def test_the_smoothed_model_exports_to_plain_transformers(name, tmp_path):
    from transformers import AutoModelForCausalLM

    compiled = slim.compile(model(name), passes=[SmoothQuant()], calibration=tokens(), target="eager")
    compiled.export(tmp_path / "out")
    (batch, *_) = tokens()
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        expected, got = model(name)(batch).logits, exported(batch).logits
    assert float((got - expected).abs().max() / expected.abs().max()) < 1e-5
    changed = [n for n, w in exported.state_dict().items() if not torch.equal(w, model(name).state_dict()[n])]
    assert len(changed) >= len(compiled.report.passes[0].matched)


# -- bad input ---------------------------------------------------------------------------------------------------------


def test_without_calibration_it_says_what_it_needs():
    with pytest.raises(errors.NeedsCalibration, match="smooth_quant"):
        slim.compile(model("llama"), passes=[SmoothQuant()], target="eager")


@pytest.mark.parametrize("alpha", [-0.1, 1.5, float("nan"), "serach", None])
def test_an_alpha_that_is_no_share_is_refused(alpha):
    with pytest.raises(errors.BadPassOption, match="alpha"):
        SmoothQuant(alpha)


def test_it_reads_back_from_its_text():
    for pass_ in (SmoothQuant(), SmoothQuant(0.8), SmoothQuant("search")):
        assert parse_pipeline(repr(pass_)) == (pass_,)


def test_quantised_weights_are_refused_before_anything_runs():
    with pytest.raises(errors.PassOrder, match="float weights"):
        run_pipeline(lifted("llama"), parse_pipeline('quantize("int8"), smooth_quant'), context())


def test_what_is_not_scaled_is_in_the_report():
    _, report = smoothed(lifted("gpt2"))
    assert {skip.site: skip.reason for skip in report.skipped} == {
        "transformer.h.0.mlp.c_proj.weight_t": "what enters it comes from aten.gelu.default, which no scale passes",
        "transformer.ln_f.weight": "transformer.wte.weight is read by aten.embedding.default too",
    }


def test_a_model_with_nothing_to_scale_is_an_error_unless_that_is_allowed():
    before = program("y = aten.linear.default(x, weights['w'])\nreturn (y,)", {"w": matrix(4, 8)})
    with pytest.raises(errors.PassMatchedNothing, match="comes from the model's inputs"):
        run_pipeline(before, [SmoothQuant()], Context(calibration=[torch.randn(2, 3, 8)]))
    _, report = run_pipeline(before, [SmoothQuant()], Context(strict=False))
    assert report.passes[0].matched == []
