"""torch.compile(model, backend="slim") gives what eager gives, for any module, and says what it cannot do."""

import logging
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.testing import CompileCounterWithBackend

from benchmarks import zoo
from slim import errors
from slim.backend import slim_backend


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


def test_generated_code_of_a_language_model_takes_other_sizes_at_one_recompile() -> None:
    model = zoo.build("llama")
    counter = CompileCounterWithBackend(
        lambda module, examples: slim_backend(module, examples, options={"target": "cpu"})
    )
    fast = torch.compile(model, backend=counter)
    with torch.no_grad():
        for shape in ((2, 9), (3, 7), (4, 11), (2, 7)):
            tokens = torch.randint(3, 90, shape)
            close(fast(tokens, use_cache=False).logits, model(tokens, use_cache=False).logits)
    assert counter.frame_count == 2


def test_an_encoder_equals_eager_with_padding() -> None:
    model, tokens = zoo.build_encoder("bert"), torch.randint(3, 90, (2, 9))
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


# -- loud --------------------------------------------------------------------------------------------------------------


def refused(error: type[Exception], model: nn.Module, x: Tensor, **arguments: Any) -> str:
    with pytest.raises(BackendCompilerFailed) as raised:
        torch.compile(model, backend=slim_backend, **arguments)(x)
    assert isinstance(raised.value.inner_exception, error)
    return str(raised.value.inner_exception)


def test_calls_that_record_gradients_are_refused_with_advice() -> None:
    assert "no_grad" in refused(errors.NeedsNoGrad, Gated(), torch.randn(2, 5, 16))


def test_unknown_options_are_refused_with_what_there_is() -> None:
    with torch.no_grad():
        text = refused(errors.BackendOption, Gated(), torch.randn(2, 5, 16), options={"pases": "fold_norms"})
    assert "Did you mean 'passes'?" in text


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
