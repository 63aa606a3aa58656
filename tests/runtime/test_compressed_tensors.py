"""Exporting as compressed-tensors: transformers' own from_pretrained gives the logits of the Program, and what the
format cannot hold is refused by name."""

import copy
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, fx
from transformers import AutoModelForCausalLM, AutoTokenizer

import slim
from slim import errors
from slim.compiler.dialect.quant import pack_int3, pack_int4
from slim.compiler.program import Program
from slim.compiler.uses import DEQUANTIZE, LINEAR, UNPACKS
from slim.runtime.compiled import CompiledModel
from slim.runtime.compressed_config import quantization_config
from slim.runtime.compressed_tensors import _packed
from slim.runtime.export import export
from slim.runtime.quantised import Scheme, restored
from tests.compiled import difference, pair, prompt
from tests.programs import Counted

ops = torch.ops.slim
PACKS = {"int4": pack_int4, "int3": pack_int3}
LIMITS = {"int8": 127, "int4": 7, "int3": 3}


@pytest.fixture(scope="module")
def package():
    """The package with which transformers reads such files."""
    return pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")


# -- Programs ----------------------------------------------------------------------------------------------------------


def linear_weights(program: Program) -> dict[str, fx.Node]:
    nodes = [node.args[1] for node in program.nodes(LINEAR)]
    return {str(node.target): node for node in nodes if node.op == "get_attr"}


def hold(program: Program, name: str, numbers: str, group: int | None = None, symmetric: bool = True) -> None:
    """Rounds a weight to the nearest of ``numbers``; asymmetric ones get the least and the largest number exactly."""
    node = linear_weights(program)[name]
    weight = program.weights[name].float()
    rows = weight.view(weight.shape[0], -1, group or weight.shape[1])
    zero = None
    if numbers == "fp8":
        scale = rows.abs().amax(-1) / 448
        q = (rows / scale[..., None]).to(torch.float8_e4m3fn).view(weight.shape)
    elif symmetric:
        scale = rows.abs().amax(-1) / LIMITS[numbers]
        q = (rows / scale[..., None]).round().to(torch.int8).view(weight.shape)
    else:
        limit = LIMITS[numbers] + 1
        low = rows.amin(-1).clamp_max(0)
        scale = (rows.amax(-1).clamp_min(0) - low) / (2 * limit - 1)
        zero = (-limit - low / scale).round().clamp(-limit, limit - 1)
        q = (rows / scale[..., None] + zero[..., None]).round().clamp(-limit, limit - 1).to(torch.int8)
        q = q.view(weight.shape)
    first = min(node.users)
    readers = list(node.users)
    grid = scale if group else scale[:, 0]
    program.weights[name] = PACKS[numbers](q) if numbers in PACKS else q
    program.weights[f"{name}_scale"] = grid.contiguous()
    node.meta["val"] = program.typer.value(node, program.weights)
    stored = program.insert(first, UNPACKS[numbers], node, like=first) if numbers in UNPACKS else node
    extra = []
    if zero is not None:
        program.weights[f"{name}_zero"] = (zero if group else zero[:, 0]).to(torch.int8).contiguous()
        extra = [program.weight_node(f"{name}_zero")]
    scale_node = program.weight_node(f"{name}_scale")
    value = program.insert(
        first, DEQUANTIZE, stored, scale_node, *extra, like=first, axis=grid.dim() - 1, group_size=group
    )
    for reader in readers:
        reader.replace_input_with(node, value)


def round_inputs(program: Program, kind: str) -> None:
    """Rounds what enters every quantised linear, once for all that share it."""
    done: dict[fx.Node, fx.Node] = {}
    for index, linear in enumerate(list(program.nodes(LINEAR))):
        x = linear.args[0]
        if linear.args[1].target is not DEQUANTIZE:
            continue
        if x not in done:
            if kind == "token":
                scale = program.insert(linear, ops.token_scale.default, x, like=linear)
                axis = x.meta["val"].dim() - 2
            else:
                program.weights[f"step_{index}"] = torch.tensor(0.02 + 0.001 * index)
                scale, axis = program.weight_node(f"step_{index}"), None
            q = program.insert(linear, ops.quantize.default, x, scale, like=linear, axis=axis)
            done[x] = program.insert(linear, DEQUANTIZE, q, scale, like=linear, axis=axis, dtype=x.meta["val"].dtype)
        linear.replace_input_with(x, done[x])


def held(name: str, numbers: str, group: int | None = None, symmetric: bool = True, inputs: str | None = None):
    program = pair(name)[1].program.copy()
    for weight in linear_weights(program):
        hold(program, weight, numbers, group, symmetric)
    if inputs:
        round_inputs(program, inputs)
    program.clean()
    return program


# -- reading back ------------------------------------------------------------------------------------------------------


def exported(program: Program, folder: Path) -> dict:
    CompiledModel(program, "eager").export(folder, format="compressed-tensors")
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def reloaded(folder: Path):
    model, found = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(found[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def logits(model) -> Tensor:
    with torch.no_grad():
        return model(prompt(padded=False)[0]).logits


def check_same(program: Program, folder: Path, tolerance: float = 1e-5) -> None:
    """transformers gives the logits of the Program."""
    assert difference(logits(reloaded(folder)), logits(CompiledModel(program, "eager"))) < tolerance


def check_linears(program: Program, folder: Path) -> None:
    """Every linear of transformers' model gives, for inputs of any kind, what the Program's weights and roundings do.

    Not the logits: steps of a token are found anew from inputs that differ in their last bits, and the largest
    magnitude then falls on 127 or on 128.
    """
    model = reloaded(folder)
    logits(model)  # the first call restores the weights
    modules = dict(model.named_modules())
    checked = 0
    for linear in program.nodes(LINEAR):
        value = linear.args[1]
        name = str(value.args[0].target if value.args[0].op == "get_attr" else value.args[0].args[0].target)
        if name in program.facts.parts:
            continue
        x = torch.randn(2, 5, value.meta["val"].shape[1])
        step = x.abs().amax(-1, keepdim=True) / 127.5
        rounded = (x / step).round().clamp(-128, 127) * step
        module = modules[name.removesuffix(".weight")]
        expected = torch.nn.functional.linear(rounded, restored(program, value), module.bias)
        assert difference(module(x), expected) < 1e-6, name
        checked += 1
    assert checked


CASES = [
    ("int8", None, True, None, "pack-quantized"),
    ("int8", 16, True, None, "pack-quantized"),
    ("int4", None, True, None, "pack-quantized"),
    ("int4", 16, True, None, "pack-quantized"),
    ("int4", 16, False, None, "pack-quantized"),
    ("int4", None, False, None, "pack-quantized"),
    ("int3", 8, True, None, "pack-quantized"),
    ("int3", 16, False, None, "pack-quantized"),
    ("int8", None, True, "tensor", "int-quantized"),
    ("int8", None, True, "token", "int-quantized"),
    ("int4", 16, True, "token", "pack-quantized"),
    ("fp8", None, True, None, "naive-quantized"),
    ("fp8", 32, True, None, "naive-quantized"),
]


@pytest.mark.parametrize(("numbers", "group", "symmetric", "inputs", "kept"), CASES)
def test_transformers_gives_the_same_logits(package, numbers, group, symmetric, inputs, kept, tmp_path):
    program = held("llama", numbers, group, symmetric, inputs)
    config = exported(program, tmp_path / "out")
    assert config["format"] == kept
    [scheme] = config["config_groups"].values()
    assert scheme["targets"] == ["Linear"]
    assert scheme["weights"]["num_bits"] == {"int8": 8, "int4": 4, "int3": 3, "fp8": 8}[numbers]
    if inputs == "token":
        check_linears(program, tmp_path / "out")
    else:
        check_same(program, tmp_path / "out")


# fused by rows; fused and interleaved by head; tied to the embedding; tied to a scaled one; biases
@pytest.mark.parametrize("name", ["phi3", "gpt_neox", "llama-mha", "gemma2", "opt", "bloom"])
@pytest.mark.parametrize(("numbers", "group", "symmetric", "inputs"), [CASES[8][:4], CASES[4][:4]])
def test_every_architecture_of_linears_is_read_back(package, name, numbers, group, symmetric, inputs, tmp_path):
    program = held(name, numbers, group, symmetric, inputs)
    exported(program, tmp_path / "out")
    check_same(program, tmp_path / "out")


@pytest.mark.parametrize("symmetric", [True, False])
def test_scales_of_half_precision_are_read_back_in_full(package, symmetric, tmp_path):
    program = held("llama", "int4", 16, symmetric)
    for name in [name for name in program.weights if name.endswith("_scale")]:
        program.weights[name] = program.weights[name].half()
    program.infer()
    exported(program, tmp_path / "out")
    check_same(program, tmp_path / "out")


@pytest.mark.parametrize("pipeline", ['quantize("int8", embeddings=True)', 'quantize("int4", group_size=8)'])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_the_pass_makes_is_read_back_in_the_type_of_the_model(package, pipeline, dtype, tmp_path):
    model = copy.deepcopy(pair("qwen2")[0]).to(dtype)
    compiled = slim.compile(model, pipeline, target="eager")
    compiled.export(tmp_path / "out", format="compressed-tensors")
    again = reloaded(tmp_path / "out")
    assert again.dtype == dtype
    # transformers casts scales to the type of the model: 8 bits of mantissa in bfloat16
    assert difference(logits(again), logits(compiled)) < (1e-5 if dtype == torch.float32 else 3e-2)


CALIBRATION = [torch.randint(3, 101, (2, 24), generator=torch.Generator().manual_seed(seed)) for seed in range(4)]


@pytest.mark.parametrize(
    "options",
    ['"int8", activations="int8", static=True', '"int4", group_size=16, symmetric=False', '"fp8"',
     '"int3", group_size=8', '"int4", group_size=16, formats=["*.down_proj.weight=int8"]'],
)  # fmt: skip
def test_all_that_the_pass_can_make_of_a_model_is_read_back(package, options, tmp_path):
    passes = f"fold_norms, quantize({options})"
    compiled = slim.compile(pair("llama")[0], passes, calibration=CALIBRATION, target="eager")
    compiled.export(tmp_path / "out", format="compressed-tensors")
    assert difference(logits(reloaded(tmp_path / "out")), logits(compiled)) < 1e-5


@pytest.mark.parametrize("options", ["outliers=0.05", "correction=4"])
def test_outlier_columns_and_corrections_are_refused(options, tmp_path):
    passes = f'quantize("int4", group_size=16, {options})'
    compiled = slim.compile(pair("llama")[0], passes, calibration=CALIBRATION, target="eager")
    refused(compiled.program, tmp_path, "weight has outlier columns or a correction beside it")


@pytest.mark.parametrize("passes", ['quantize_kv("int8")', 'quantize("int8"), quantize_kv("int8")'])
def test_rounded_keys_and_values_are_refused(passes, tmp_path):
    compiled = slim.compile(pair("llama")[0], passes, target="eager")
    refused(compiled.program, tmp_path, "rounds what attention.* reads, which is no quantised linear")


def test_formats_that_differ_become_groups_and_what_is_left_out_is_ignored(package, tmp_path):
    program = pair("llama")[1].program.copy()
    for name in linear_weights(program):
        if "mlp" in name:
            hold(program, name, "int4", 8 if "down" in name else 16)
        elif "self_attn" in name:
            hold(program, name, "fp8")
    program.clean()
    config = exported(program, tmp_path / "out")
    assert config["format"] == "mixed-precision"
    assert {group["format"] for group in config["config_groups"].values()} == {"pack-quantized", "naive-quantized"}
    assert sorted(len(group["targets"]) for group in config["config_groups"].values()) == [2, 4, 8]
    assert config["ignore"] == ["lm_head"]
    check_same(program, tmp_path / "out")


def test_an_artifact_with_a_tokenizer_is_exported(package, shared, tmp_path):
    source = shared / "models" / "stories260K"
    slim.compile(source, 'fold_norms, quantize("int4", group_size=8)', target="eager").save(tmp_path / "artifact")
    compiled = slim.load(tmp_path / "artifact", target="eager")
    compiled.export(tmp_path / "out", format="compressed-tensors")
    assert difference(logits(reloaded(tmp_path / "out")), logits(compiled)) < 1e-5
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("Once").input_ids


def test_experts_that_are_not_quantised_stay_beside_linears_that_are(package, tmp_path):
    program = pair("mixtral")[1].program.copy()
    for name in linear_weights(program):
        if "self_attn" in name:
            hold(program, name, "int8", 8)
    program.clean()
    exported(program, tmp_path / "out")
    check_same(program, tmp_path / "out")


# -- files -------------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(rows=st.integers(1, 5), width=st.integers(1, 70), bits=st.sampled_from([3, 4]), seed=st.integers(0, 99))
def test_numbers_are_packed_as_the_package_unpacks_them(package, rows, width, bits, seed):
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    limit = 1 << bits - 1
    numbers = torch.randint(-limit, limit, (rows, width), generator=torch.Generator().manual_seed(seed)).to(torch.int8)
    assert torch.equal(_packed(numbers, bits), pack_to_int32(numbers, bits))


def test_formats_are_those_that_the_package_would_choose(package):
    from compressed_tensors.compressors.format import infer_module_format
    from compressed_tensors.quantization import QuantizationScheme

    for numbers, group, symmetric, inputs, kept in CASES:
        if (numbers, inputs) == ("int4", "token"):  # it would take a byte a number
            continue
        config = quantization_config(torch.nn.Linear(2, 2), {"": Scheme(numbers, group, symmetric, inputs)})
        scheme = QuantizationScheme.model_validate({**config["config_groups"]["group_0"], "format": None})
        assert infer_module_format(torch.nn.Linear, scheme).value == kept


@pytest.mark.parametrize(("numbers", "group", "bits"), [("int8", None, 8), ("int4", 16, 4), ("int3", 8, 3)])
def test_files_shrink_as_the_bits_say(numbers, group, bits, tmp_path):
    program = held("llama", numbers, group)
    exported(program, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    sizes = {name: linear.meta["val"].shape for name, linear in linear_weights(pair("llama")[1].program).items()}
    for name, (rows, columns) in sizes.items():
        stem = name.removesuffix("weight")
        packed = tensors[f"{stem}weight_packed"]
        assert packed.nbytes == rows * columns * bits // 8
        assert tensors[f"{stem}weight_scale"].nbytes == 4 * rows * columns // (group or columns)


def test_large_models_are_written_in_shards_one_weight_in_memory_at_a_time(package, tmp_path, monkeypatch):
    monkeypatch.setattr("slim.runtime.storage.SHARD_BYTES", 20_000)
    program = held("llama", "int4", 8)
    for name in program.weights:
        program.weights[name] = Counted(program.weights[name])
    Counted.reset()
    export(program, tmp_path / "out", "compressed-tensors")
    assert Counted.most == 1
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    check_same(program, tmp_path / "out")


def test_a_failure_to_write_leaves_nothing(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("slim.runtime.compressed_tensors.write_weights", full)
    with pytest.raises(errors.SaveFailed, match="No space left"):
        exported(held("llama", "int8"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# -- what the format cannot hold ---------------------------------------------------------------------------------------


def refused(program: Program, folder: Path, text: str) -> None:
    with pytest.raises(errors.ExportUnsupported, match=text):
        export(program, folder / "out", "compressed-tensors")
    assert list(folder.iterdir()) == []


def test_models_without_quantised_weights_are_refused(tmp_path):
    refused(pair("llama")[1].program, tmp_path, "no weight is quantised; format='transformers'")


@pytest.mark.parametrize(
    ("name", "text"),
    [("gpt2", r"transformer.h.0.attn.c_proj.weight_t belongs to a Conv1D"),
     ("mixtral", r"model.layers.0.mlp.experts.\w+ belongs to a MixtralExperts.*exclude it, or export with dequantize")],
)  # fmt: skip
def test_what_is_no_linear_is_refused_by_name(name, text, tmp_path):
    compiled = slim.compile(pair(name)[0], 'quantize("int8")', target="eager")
    refused(compiled.program, tmp_path, text)


def test_levels_that_are_not_evenly_spaced_are_refused(tmp_path):
    program = held("llama", "int4", 8)
    for node in list(program.nodes(UNPACKS["int4"])):
        node.target = UNPACKS["nf4"]
    refused(program, tmp_path, "model.layers.0.self_attn.q_proj.weight is nf4, whose levels are not evenly spaced")


def test_fused_weights_are_of_one_format_or_refused(tmp_path):
    program = pair("phi3")[1].program.copy()
    first, second, *_ = linear_weights(program)
    hold(program, first, "int8")
    program.clean()
    refused(program.copy(), tmp_path, f"{second} is not quantised and other parts of .*qkv_proj.weight are")
    for name in linear_weights(program):
        hold(program, name, "int4", 8)
    refused(program, tmp_path, "parts of .*qkv_proj.weight are quantised unlike each other")


def test_roundings_of_what_no_quantised_linear_reads_are_refused(tmp_path):
    program = held("llama", "int8", inputs="token")
    head = program.graph.output_node().args[0][0]
    assert head.target is LINEAR
    hold_back = restored(program, head.args[1])
    program.weights["lm_head.weight"] = hold_back
    head.replace_input_with(head.args[1], program.weight_node("lm_head.weight"))
    program.clean()
    refused(program, tmp_path, r"rounds what linear\w* .*reads, which is no quantised linear")


def test_zero_points_beyond_the_numbers_are_refused(tmp_path):
    program = held("llama", "int4", 8, symmetric=False)
    program.weights["model.layers.0.mlp.up_proj.weight_zero"][3] = 9
    refused(program, tmp_path, r"model.layers.0.mlp.up_proj.weight has zero points from -?\d+ to 9")


def test_zero_points_are_not_mixed_with_what_transformers_would_misread(tmp_path):
    program = held("llama", "int4", 8, symmetric=False, inputs="token")
    refused(program, tmp_path, "q_proj.weight has zero points.*no inputs are rounded")
    program = pair("llama")[1].program.copy()
    for name in linear_weights(program):
        hold(program, name, "int4", 8, symmetric="mlp" in name)
    refused(program, tmp_path, "q_proj.weight has zero points.*quantised alike")


def test_what_stands_beside_a_quantised_weight_is_refused(tmp_path):
    program = held("llama", "int8")
    program.weights["model.layers.0.mlp.up_proj.weight_outliers"] = torch.zeros(2, 2)
    refused(program, tmp_path, r"up_proj.weight has outlier columns or a correction beside it \(.*weight_outliers\)")


def test_dequantising_into_a_format_of_integers_is_contradictory(tmp_path):
    with pytest.raises(errors.ContradictoryOptions, match="format='transformers'"):
        export(held("llama", "int8"), tmp_path / "out", "compressed-tensors", dequantize=True)


def test_plain_transformers_gets_the_numbers_and_no_roundings(tmp_path, caplog):
    program = held("llama", "int8", inputs="tensor")
    with pytest.raises(errors.ExportUnsupported, match="format='compressed-tensors'"):
        export(program, tmp_path / "out")
    with caplog.at_level("WARNING"):
        export(program, tmp_path / "out", dequantize=True)
    assert "roundings of activations are left out" in caplog.text
    assert difference(logits(reloaded(tmp_path / "out")), logits(CompiledModel(held("llama", "int8"), "eager"))) < 1e-5
