"""Exporting: what plain transformers reads back gives the same logits, and what it cannot hold is refused."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import slim
from benchmarks import zoo
from slim import errors
from slim.runtime.compiled import CompiledModel
from tests.compiled import difference, pair, prompt

# Separate weights; fused and transposed ones; fused qkv by rows; tied and offset norms; experts; biases.
MODELS = ["llama", "gpt2", "gpt_neox", "gemma2", "mixtral", "opt"]


def reloaded(folder: Path):
    model, found = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(found[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(prompt(padded=False)[0]).logits


@pytest.mark.parametrize("name", MODELS)
def test_transformers_reads_back_the_same_model(name, tmp_path):
    model, compiled = pair(name)
    compiled.export(tmp_path / "out")
    again = reloaded(tmp_path / "out")
    assert type(again) is type(model)
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key
    assert torch.equal(logits(again), logits(model))


def test_a_folded_norm_has_the_type_of_the_model_whatever_that_of_the_scales_is(tmp_path):
    compiled = slim.compile(pair("llama")[0], 'fold_norms, quantize("int4", group_size=2)', target="eager")
    compiled.export(tmp_path / "out", dequantize=True)
    assert {p.dtype for p in reloaded(tmp_path / "out").parameters()} == {torch.float32}


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_folded_norms_are_written_as_neutral_ones(name, tmp_path):
    compiled = slim.compile(pair(name)[0], "fold_norms", target="eager")
    compiled.export(tmp_path / "out")
    assert difference(logits(reloaded(tmp_path / "out")), logits(compiled)) < 1e-5


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_integers_are_refused_and_written_as_numbers_on_request(weights, tmp_path):
    compiled = slim.compile(pair("gpt2")[0], f'quantize("{weights}")', target="eager")
    with pytest.raises(errors.ExportUnsupported, match="dequantize=True"):
        compiled.export(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    compiled.export(tmp_path / "out", dequantize=True)
    assert difference(logits(reloaded(tmp_path / "out")), logits(compiled)) < 1e-5


def test_a_loaded_artifact_exports_as_well(shared, tmp_path):
    source = shared / "models" / "stories260K"
    slim.compile(source, target="eager").save(tmp_path / "artifact")
    slim.load(tmp_path / "artifact", target="eager").export(tmp_path / "out")
    assert torch.equal(logits(reloaded(tmp_path / "out")), logits(AutoModelForCausalLM.from_pretrained(source)))
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("Once").input_ids
    assert not (tmp_path / "out" / "slim.json").exists()


def test_shapes_that_the_configuration_does_not_say_are_refused(tmp_path):
    program = pair("llama")[1].program.copy()
    name = "model.layers.0.mlp.down_proj.weight"
    program.weights[name] = program.weights[name][:, :-1]
    with pytest.raises(errors.ExportUnsupported, match=r"down_proj.weight is \[64, 95\], .* \[64, 96\]"):
        CompiledModel(program, "eager").export(tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda weights: weights.__delitem__("model.norm.weight"), "model.norm.weight .* no longer part"),
        (lambda weights: weights.__setitem__("model.extra", torch.zeros(2)), "no place for model.extra"),
    ],
    ids=["missing", "left over"],
)
def test_names_must_be_the_architectures_own(tmp_path, change, text):
    from slim.runtime.export import export

    program = pair("llama")[1].program.copy()
    change(program.weights)
    with pytest.raises(errors.ExportUnsupported, match=text):
        export(program, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_format_and_a_plain_module_are_refused(tmp_path):
    with pytest.raises(errors.ExportUnsupported, match=r"'gguf'.*transformers"):
        pair("llama")[1].export(tmp_path / "out", format="gguf")
    module = slim.compile(torch.nn.Linear(2, 2), example_inputs=torch.rand(3, 2), target="eager")
    with pytest.raises(errors.ExportUnsupported, match="Linear is not one of transformers' own"):
        module.export(tmp_path / "out")


def test_an_earlier_export_is_replaced_and_nothing_else_is(tmp_path):
    compiled = pair("llama")[1]
    compiled.export(tmp_path / "out")
    compiled.export(tmp_path / "out")
    (tmp_path / "out" / "notes.txt").write_text("precious")
    with pytest.raises(errors.SaveFailed, match="other files"):
        compiled.export(tmp_path / "out")
    assert (tmp_path / "out" / "notes.txt").read_text() == "precious"


def test_the_models_own_source_is_never_overwritten(tmp_path):
    zoo.build("llama").save_pretrained(tmp_path / "source")
    compiled = slim.compile(tmp_path / "source", target="eager")
    with pytest.raises(errors.SaveFailed):
        compiled.export(tmp_path / "source")


def test_a_failure_to_write_leaves_nothing(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("slim.runtime.export.copy_tokenizer", full)
    with pytest.raises(errors.SaveFailed, match="No space left"):
        pair("llama")[1].export(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_configuration_says_the_type_that_the_weights_have(tmp_path):
    """A model that was moved to another type keeps a configuration that says the old one."""
    slim.compile(zoo.build("qwen2").bfloat16(), "fold_norms", target="eager").export(tmp_path / "out")
    assert {value.dtype for value in reloaded(tmp_path / "out").state_dict().values()} == {torch.bfloat16}
