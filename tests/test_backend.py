"""torch.compile(model, backend="slim") gives what eager gives, for any module, and says what it cannot do."""

import logging
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor, fx, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.testing import CompileCounterWithBackend

from benchmarks import zoo
from slim import backend, errors
from slim.backend import slim_backend
from slim.codegen import build


@pytest.fixture(autouse=True)
def _fresh() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(model: nn.Module, **options: Any) -> Any:
    """``model`` by the backend on target eager, unless another is asked for."""
    return torch.compile(model, backend=slim_backend, options={"target": "eager"} | options)


def close(ours: Any, theirs: Any, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 64), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.up(self.norm(x)).chunk(2, -1)
        return x + self.down(torch.nn.functional.silu(gate) * up)


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class Convolving(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.GELU(), nn.Flatten(2))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean(-1))


# -- right -------------------------------------------------------------------------------------------------------------

PLAIN = {"gated": (Gated, (2, 5, 16)), "attention": (Attending, (2, 5, 16)), "convolution": (Convolving, (2, 3, 8, 8))}


@pytest.mark.parametrize("target", ["eager", "cpu"])
@pytest.mark.parametrize("name", PLAIN)
def test_a_plain_module_equals_eager(name: str, target: str) -> None:
    kind, shape = PLAIN[name]
    model, x = kind().eval(), torch.randn(shape)
    with torch.no_grad():
        close(compiled(model, target=target)(x), model(x))


def test_a_language_model_equals_eager() -> None:
    model, tokens = zoo.build("gpt2"), torch.randint(3, 90, (2, 9))
    with torch.no_grad():
        ours = compiled(model)(input_ids=tokens, use_cache=False).logits
        close(ours, model(input_ids=tokens, use_cache=False).logits)


@pytest.mark.parametrize("name", ["bloom", "mixtral"])
def test_spellings_that_only_torch_compile_meets_take_other_sizes(name: str) -> None:
    """Heads that were folded into the batch by a -1; experts as one call of a grouped product."""
    model = zoo.build(name)
    fast = compiled(model, target="cpu")
    equal_at(fast, model, (1, 9), (2, 7), (3, 5))


def test_what_cannot_be_lifted_for_all_sizes_is_compiled_for_each_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Conv1d(1, 4, 29, stride=3), nn.Conv1d(4, 2, 5)).eval()
    fast = compiled(model)
    with torch.no_grad():
        for length in (80, 120, 90, 120):
            x = torch.randn(1, 1, length)
            close(fast(x), model(x))
    told = [message for message in caplog.messages if "for each set of sizes and numbers" in message]
    assert len(told) == 2, "the first is compiled for its sizes by Dynamo itself, and the last is there already"
    assert "Kernel size" in told[0]


def test_generated_code_of_a_language_model_takes_other_sizes_at_one_recompile() -> None:
    model = zoo.build("llama")
    counter = CompileCounterWithBackend(
        lambda module, examples: slim_backend(module, examples, options={"target": "cpu"})
    )
    fast = torch.compile(model, backend=counter)
    equal_at(fast, model, (2, 9), (3, 7), (4, 11), (2, 7))
    assert counter.frame_count == 2


def test_an_encoder_equals_eager_with_padding() -> None:
    model, tokens = zoo.build_encoder("bert"), torch.randint(3, 90, (2, 9))
    mask = torch.ones_like(tokens)
    mask[0, 6:] = 0
    with torch.no_grad():
        ours = compiled(model)(input_ids=tokens, attention_mask=mask).last_hidden_state
        close(ours, model(input_ids=tokens, attention_mask=mask).last_hidden_state)


def test_an_encoder_that_adds_a_bias_to_masked_scores_equals_eager() -> None:
    model, tokens = zoo.build_encoder("mpnet"), torch.randint(3, 60, (2, 9))
    mask = torch.ones_like(tokens)
    mask[0, 6:] = 0
    with torch.no_grad():
        ours = compiled(model)(input_ids=tokens, attention_mask=mask).last_hidden_state
        close(ours, model(input_ids=tokens, attention_mask=mask).last_hidden_state)


def test_a_vision_transformer_equals_eager() -> None:
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=32,
                       patch_size=8)  # fmt: skip
    model, image = ViTModel(config).eval(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        close(compiled(model)(image).last_hidden_state, model(image).last_hidden_state)


def test_two_lengths_and_two_batches_cost_one_recompile() -> None:
    model = Gated().eval()
    counter = CompileCounterWithBackend(
        lambda module, examples: slim_backend(module, examples, options={"target": "eager"})
    )
    fast = torch.compile(model, backend=counter)
    with torch.no_grad():
        for shape in ((2, 5, 16), (3, 7, 16), (4, 9, 16), (2, 7, 16)):
            x = torch.randn(shape)
            close(fast(x), model(x))
    assert counter.frame_count == 2


def test_fullgraph_works_and_a_graph_break_is_named(caplog: pytest.LogCaptureFixture) -> None:
    class Breaking(Gated):
        def forward(self, x: Tensor) -> Tensor:
            x = super().forward(x)
            print("between two graphs")
            return super().forward(x) if x.sum() > 0 else x

    model, x = Breaking().eval(), torch.randn(2, 5, 16).abs()
    with torch.no_grad(), caplog.at_level(logging.WARNING, logger="slim.backend"):
        close(compiled(model)(x), model(x))
    assert "graph break 1 at " in caplog.text
    assert "print" in caplog.text
    assert "a branch depends on the numbers in a tensor" in caplog.text
    with torch.no_grad():
        whole = Gated().eval()
        close(torch.compile(whole, backend=slim_backend, fullgraph=True)(x), whole(x))


def test_a_graph_break_is_told_anew_after_a_reset(caplog: pytest.LogCaptureFixture) -> None:
    def breaking(x: Tensor) -> Tensor:
        x = x * 2
        torch._dynamo.graph_break()
        return x + 1

    for _ in range(2):
        torch._dynamo.reset()
        with torch.no_grad():
            torch.compile(breaking, backend=slim_backend)(torch.ones(3))
    assert sum("graph break 1 at " in message for message in caplog.messages) == 2


def test_threads_compile_a_graph_once_for_each_model(monkeypatch: pytest.MonkeyPatch) -> None:
    models, x, made, given = [Gated().eval() for _ in range(2)], torch.randn(2, 5, 16), [], []

    def kept(module: fx.GraphModule, examples: Any) -> Any:
        made.append(slim_backend(module, examples, options={"target": "eager"}))
        return lambda *arguments: given.append(arguments) or made[0](*arguments)

    with torch.no_grad():
        torch.compile(models[0], backend=kept)(x)
        wanted = models[1](x)
    of, pieces = backend.Piece.of, []
    monkeypatch.setattr(backend.Piece, "of", lambda *args: pieces.append(1) or of(*args))
    other = dict(zip(map(id, models[0].parameters()), models[1].parameters(), strict=True))
    arguments = [other.get(id(one), one) for one in given[0]]
    # Not by torch.compile: it refuses to be called while any thread traces.
    with ThreadPoolExecutor(4) as pool:
        for (result,) in pool.map(lambda _: made[0](*arguments), range(8)):
            close(result, wanted)
    assert len(pieces) == 1


def test_threads_may_call_what_is_compiled_at_once() -> None:
    model, rows = Gated().eval(), [torch.randn(2, 5, 16) for _ in range(16)]
    fast = compiled(model)
    with torch.no_grad():
        fast(rows[0])
        wanted = [model(x) for x in rows]
    with ThreadPoolExecutor(4) as pool:
        for ours, theirs in zip(pool.map(torch.no_grad()(fast), rows), wanted, strict=True):
            close(ours, theirs)


class Divided(Gated):
    def __init__(self) -> None:
        super().__init__()
        self.by = 3.0

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x) / self.by
        return x / x.abs().max().item()


def equal_at(fast: Any, model: nn.Module, *shapes: tuple[int, int]) -> None:
    """Logits of random tokens of each shape."""
    with torch.no_grad():
        for shape in shapes:
            tokens = torch.randint(3, 90, shape)
            close(fast(tokens, use_cache=False).logits, model(tokens, use_cache=False).logits)


def test_floats_that_change_are_compiled_in_and_said_so(caplog: pytest.LogCaptureFixture) -> None:
    model = Divided().eval()
    fast = torch.compile(model, backend=slim_backend, dynamic=True)
    with torch.no_grad():
        for by, length in ((3.0, 5), (4.0, 5), (5.0, 7), (3.0, 9)):
            model.by, x = by, torch.randn(2, length, 16)
            close(fast(x), model(x))
        scaled, x = Scaled().eval(), torch.randn(2, 5, 16)
        fast = compiled(scaled)
        caplog.clear()
        for factor in (0.1, 0.2, 0.3, 0.2):
            close(fast(x, factor), scaled(x, factor))
    assert [message for message in caplog.messages if "once more" in message] == [
        "a graph is compiled once more, for other numbers: [0.3]"
    ]


def test_dynamic_true_takes_all_sizes_at_once() -> None:
    model = zoo.build("llama")
    counter = CompileCounterWithBackend("slim")
    fast = torch.compile(model, backend=counter, dynamic=True)
    equal_at(fast, model, (2, 5), (2, 7), (3, 5), (3, 9))
    assert counter.frame_count == 1


def test_a_batch_of_two_is_seen_to_be_causal_whatever_its_sizes() -> None:
    model, tokens = zoo.build("llama"), torch.randint(3, 90, (2, 8))
    passes = 'gqa(kv_heads=1), quantize_kv("int8")'
    fast = compiled(model, passes=passes, calibration=[{"input_ids": tokens}])
    with torch.no_grad():
        assert torch.isfinite(fast(input_ids=tokens, use_cache=False).logits).all()


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("padded", [False, True])
def test_passes_see_into_the_encoder_layers_that_pytorch_runs_in_one_call(
    norm_first: bool, activation: str, padded: bool
) -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=norm_first, activation=activation)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    x, mask = torch.randn(2, 5, 16), torch.tensor([[0, 0, 0, 1, 1], [0] * 5]).bool() if padded else None
    with torch.no_grad():
        exact = model(x, src_key_padding_mask=mask)
        ours = compiled(model)(x, src_key_padding_mask=mask)
        torch._dynamo.reset()
        rounded = compiled(model, passes='quantize("int8")')(x, src_key_padding_mask=mask)
    seen = torch.ones(2, 5, dtype=torch.bool) if mask is None else ~mask
    close(ours[seen], exact[seen])
    assert 1e-5 < float((rounded - exact)[seen].abs().max()) < 0.1


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradients_may_be_left_out_within_what_is_compiled(mode: Any) -> None:
    model, x = Gated().eval(), torch.randn(2, 5, 16)

    @mode()
    def run(x: Tensor) -> Tensor:
        return model(x)

    close(torch.compile(run, backend=slim_backend)(x), run(x))


def test_passes_are_applied() -> None:
    model, x = Gated().eval(), torch.randn(2, 5, 16)
    with torch.no_grad():
        exact = model(x)
        rounded = compiled(model, passes='quantize("int8")')(x)
    assert 0 < (rounded - exact).abs().max() < 0.1


def test_passes_that_need_data_take_it_by_argument() -> None:
    model, x = Gated().eval(), torch.randn(2, 5, 16)
    data = [(torch.randn(2, 5, 16),) for _ in range(4)]
    with torch.no_grad():
        smooth = compiled(model, passes="smooth_quant(0.5)", calibration=data)(x)
        close(smooth, model(x))


# -- mutation and aliasing ---------------------------------------------------------------------------------------------


def test_inputs_and_buffers_that_a_model_changes_are_changed() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.register_buffer("calls", torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            self.calls.add_(1)
            x.mul_(2)
            return self.linear(x) + self.calls

    ours, theirs = Counting().eval(), Counting().eval()
    theirs.load_state_dict(ours.state_dict())
    fast = compiled(ours)
    with torch.no_grad():
        for _ in range(3):
            x = torch.randn(2, 4)
            y = x.clone()
            close(fast(x), theirs(y))
            close(x, y)
    assert ours.calls.item() == 3


def test_results_that_are_inputs_or_views_of_them_stay_so() -> None:
    class Viewing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> tuple[Any, ...]:
            return self.linear(x), x.view(-1)[1:], x, x.shape[0] * 2

    model, x = Viewing().eval(), torch.randn(3, 4)
    with torch.no_grad():
        for rows in (3, 5):
            x = torch.randn(rows, 4)
            y, view, same, size = compiled(model)(x)
            close(y, model(x)[0])
            assert view.data_ptr() == x.data_ptr() + 4
            assert same is x
            assert size == 2 * rows


def test_a_view_of_an_input_that_is_written_to_is_written_to_once() -> None:
    class Writing(Gated):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, int]:
            y = x.add_(1)
            return y.view(-1)[2:], super().forward(y), x.shape[0] // 2

    model = Writing().eval()
    fast = compiled(model)
    with torch.no_grad():
        for rows in (4, 6, 7):
            ours = torch.randn(rows, 5, 16)
            theirs = ours.clone()
            view, result, half = fast(ours)
            expected = model(theirs)
            close(ours, theirs)
            close(view, expected[0])
            close(result, expected[1])
            assert (view.data_ptr(), half) == (ours.data_ptr() + 8, rows // 2)


def test_running_averages_of_a_norm_in_training_are_kept() -> None:
    ours, theirs = (nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16)) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    fast = compiled(ours)
    with torch.no_grad():
        for _ in range(2):
            x = torch.randn(6, 16)
            close(fast(x), theirs(x))
    close(ours[1].running_mean, theirs[1].running_mean)
    close(ours[1].running_var, theirs[1].running_var)
    assert ours[1].num_batches_tracked == 2


def test_inputs_that_overlap_are_refused_where_one_is_written_to() -> None:
    class Writing(Gated):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            x.add_(1)
            return super().forward(y)

    model, x = Writing().eval(), torch.randn(6, 5, 16)
    fast = compiled(model)
    with torch.no_grad():
        close(fast(x[:3].clone(), x[3:]), model(x[:3].clone(), x[3:]))
        close(fast(x[:3], x[3:]), model(x[:3].clone(), x[3:]))
        with pytest.raises(errors.BadInput, match="shares memory"):
            fast(x[:4], x[2:])


# -- several of one --------------------------------------------------------------------------------------------------


def test_instances_of_one_class_are_compiled_each_with_its_own_weights() -> None:
    models, x = [Gated().eval() for _ in range(2)], torch.randn(2, 5, 16)
    fast = [compiled(model) for model in models]
    with torch.no_grad():
        for one, model in [*zip(fast, models, strict=True)] * 2:
            close(one(x), model(x))


def test_a_block_that_breaks_the_graph_may_be_there_several_times() -> None:
    class Block(Gated):
        def forward(self, x: Tensor) -> Tensor:
            x = super().forward(x)
            torch._dynamo.graph_break()
            return super().forward(x)

    model, x = nn.Sequential(Block(), Block(), Block()).eval(), torch.randn(2, 5, 16)
    with torch.no_grad():
        close(compiled(model)(x), model(x))


# Of the two, Dynamo has one symbol for the batch of tokens and mask with bert, and two with electra.
@pytest.mark.parametrize("name", ["bert", "electra"])
def test_passes_and_a_mask_take_other_sizes(name: str) -> None:
    model = zoo.build_encoder(name)
    fast = compiled(model, passes='quantize("int8")')
    with torch.no_grad():
        for shape in ((2, 9), (3, 7), (4, 11)):
            tokens, mask = torch.randint(3, 90, shape), torch.ones(shape, dtype=torch.int64)
            mask[0, 5:] = 0
            ours = fast(input_ids=tokens, attention_mask=mask).last_hidden_state
            theirs = model(input_ids=tokens, attention_mask=mask).last_hidden_state
            assert 0 < (ours - theirs)[mask.bool()].abs().max() < 0.2


def test_a_language_model_that_returns_its_cache_equals_eager() -> None:
    model, tokens = zoo.build("llama"), torch.randint(3, 90, (2, 9))
    mask = torch.ones_like(tokens)
    with torch.no_grad():
        ours, theirs = (one(input_ids=tokens, attention_mask=mask) for one in (compiled(model), model))
    close(ours.logits, theirs.logits)
    for layer, expected in zip(ours.past_key_values.layers, theirs.past_key_values.layers, strict=True):
        close(layer.keys, expected.keys)
        close(layer.values, expected.values)


# -- loud --------------------------------------------------------------------------------------------------------------


def refused(error: type[Exception], model: nn.Module, x: Tensor, **arguments: Any) -> str:
    with pytest.raises(BackendCompilerFailed) as raised:
        torch.compile(model, backend=slim_backend, **arguments)(x)
    assert isinstance(raised.value.inner_exception, error)
    return str(raised.value.inner_exception)


def test_gradients_that_are_recorded_within_are_refused() -> None:
    model = Gated().eval()

    def recording(x: Tensor) -> Tensor:
        with torch.enable_grad():
            return model(x)

    with torch.no_grad():
        refused(errors.NeedsNoGrad, recording, torch.randn(2, 5, 16))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "change", [lambda m: m.half().float(), lambda m: m._apply(lambda t: t * 0), lambda m: m.double().float()]
)
def test_weights_that_moved_are_noticed(change: Any) -> None:
    model, x = Gated().eval(), torch.randn(2, 5, 16)
    fast = compiled(model)
    with torch.no_grad():
        fast(x)
        change(model)
        with pytest.raises(errors.WeightsChanged):
            fast(x)


@pytest.mark.skipif(build.missing() is not None, reason="no C++ here")
def test_what_kernels_would_round_or_cannot_hold_is_refused_or_left_to_pytorch(
    caplog: pytest.LogCaptureFixture,
) -> None:
    x = torch.randn(1000, dtype=torch.float64)
    with torch.no_grad():
        for given, reason in ((x, "float64"), (x.to(torch.complex64), "complex")):
            with pytest.raises(BackendCompilerFailed, match=reason):
                torch.compile(torch.exp, backend=slim_backend, options={"target": "cpu"})(given)
            torch._dynamo.reset()
            assert torch.equal(
                torch.compile(torch.exp, backend=slim_backend, options={"target": "eager"})(given), given.exp()
            )
            torch._dynamo.reset()

        def within(x: Tensor) -> Tensor:
            return (x.double().exp() - 1).log1p().float()

        ours = torch.compile(within, backend=slim_backend, options={"target": "cpu"})(x.float() * 1e-6)
        assert torch.equal(ours, within(x.float() * 1e-6))
    assert "to PyTorch: kernels compute in float32" in caplog.text


def test_calls_that_record_gradients_are_refused_with_advice() -> None:
    assert "no_grad" in refused(errors.NeedsNoGrad, Gated(), torch.randn(2, 5, 16))


def test_calibration_that_no_pass_reads_is_told(caplog: pytest.LogCaptureFixture) -> None:
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        compiled(Gated(), passes="fold_norms", calibration=[(x,)])(x)
    assert "no pass of this pipeline reads it" in caplog.text


def test_unknown_options_are_refused_with_what_there_is() -> None:
    with torch.no_grad():
        text = refused(errors.BackendOption, Gated(), torch.randn(2, 5, 16), options={"pases": "fold_norms"})
    assert "Did you mean 'passes'?" in text


@pytest.mark.parametrize("options", [{"verify": "no"}, {"strict": None}, {"target": 3}], ids=str)
def test_options_of_another_type_are_refused(options: dict[str, Any]) -> None:
    with torch.no_grad():
        text = refused(errors.BadInput, Gated(), torch.randn(2, 5, 16), options=options)
    assert next(iter(options)) in text


class Scaled(Gated):
    def forward(self, x: Tensor, factor: float) -> Tensor:
        return super().forward(x) * factor


def test_whole_numbers_that_change_are_compiled_for_each_up_to_a_number(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = Scaled().eval(), torch.randn(2, 5, 16)
    monkeypatch.setattr("slim.backend._MOST", 3)
    fast = compiled(model)
    with torch.no_grad():
        for factor in (2, 3, 4, 3, 5, 5):
            close(fast(x, factor), model(x, factor))
        with pytest.raises(errors.BadInput, match="make numbers that change tensors"):
            fast(x, 6)
    assert sum("for each set of sizes and numbers" in message for message in caplog.messages) == 3


def test_weights_made_in_inference_mode_are_compiled() -> None:
    with torch.inference_mode():
        model, x = Gated().eval(), torch.randn(2, 5, 16)
        close(compiled(model)(x), model(x))


def test_a_break_at_the_end_of_a_frame_is_told(caplog: pytest.LogCaptureFixture) -> None:
    class Ending(Gated):
        def forward(self, x: Tensor) -> Tensor:
            x = super().forward(x)
            print("at the end")
            return x

    with torch.no_grad(), caplog.at_level(logging.WARNING, logger="slim.backend"):
        compiled(Ending().eval())(torch.randn(2, 5, 16))
    assert "graph break 1 at " in caplog.text


def test_a_weight_that_changed_is_noticed() -> None:
    model, x = Gated().eval(), torch.randn(2, 5, 16)
    fast = compiled(model)
    with torch.no_grad():
        fast(x)
        model.down.weight.mul_(2)
        with pytest.raises(errors.WeightsChanged, match="reset"):
            fast(x)
        torch._dynamo.reset()
        close(fast(x), model(x))


def test_a_fresh_process_finds_the_backend_by_its_name() -> None:
    listed = "import torch; print('slim' in torch._dynamo.list_backends())"
    said = subprocess.run([sys.executable, "-c", listed], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "True", said.stderr
