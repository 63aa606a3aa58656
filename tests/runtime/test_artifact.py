"""Artifacts: all of a compiled model or none of it, checked when read, and nothing executed."""

import errno
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import slim
from slim import errors
from slim.compiler.weights import Weights
from slim.runtime import storage
from slim.runtime.artifact import MANIFEST, check_destination, is_artifact, load
from slim.runtime.cache import KVCacheConfig
from slim.runtime.compiled import CompiledModel
from tests.compiled import pair, prompt


@pytest.fixture(scope="module")
def compiled() -> CompiledModel:
    return slim.compile(
        pair("llama")[0], 'fold_norms, quantize("int8")', target="eager", kv_cache=KVCacheConfig(max_tokens=64)
    )


@pytest.fixture
def saved(compiled: CompiledModel, tmp_path: Path) -> Path:
    compiled.save(tmp_path / "model")
    return tmp_path / "model"


def everything(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


# -- there and back ----------------------------------------------------------------------------------------------------


def test_it_comes_back_as_it_was(compiled, saved):
    again = slim.load(saved, target="eager")
    tokens, mask = prompt()
    assert torch.equal(again(tokens, attention_mask=mask).logits, compiled(tokens, attention_mask=mask).logits)
    assert str(again.program) == str(compiled.program)
    forms = {"forms": compiled.report.forms}  # what was made of the Program here, and how long that took
    assert replace(again.report, **forms) == compiled.report
    assert again.pipeline == compiled.pipeline == 'fold_norms(), quantize("int8")'
    assert again.kv_cache == KVCacheConfig(max_tokens=64)
    assert again.config.to_dict() == compiled.config.to_dict()


def test_packed_weights_are_held_and_come_back_packed(tmp_path):
    compiled = slim.compile(pair("llama")[0], 'quantize("int4", group_size=16)', target="eager")
    compiled.save(tmp_path / "model")
    again = slim.load(tmp_path / "model", target="eager")
    tokens, mask = prompt()
    assert torch.equal(again(tokens, attention_mask=mask).logits, compiled(tokens, attention_mask=mask).logits)
    assert str(again.program) == str(compiled.program)
    assert again.program.weights.dtype("lm_head.weight") == torch.uint8
    assert again.program.weights.dtype("lm_head.weight_scale") == torch.float16
    held = sum(file.stat().st_size for file in (tmp_path / "model").glob("*.safetensors"))
    assert again.program.nbytes == compiled.program.nbytes < held < compiled.program.nbytes + 8192  # the header


def test_a_fresh_process_gives_the_same_bits(compiled, saved, tmp_path):
    tokens, _ = prompt()
    torch.save((tokens, compiled(tokens).logits), tmp_path / "expected.pt")
    code = (
        "import sys, torch, slim; torch.set_num_threads(1); tokens, expected = torch.load(sys.argv[2]); "
        "sys.exit(not torch.equal(slim.load(sys.argv[1], target='eager')(tokens).logits, expected))"
    )
    root = Path(slim.__file__).parents[1]
    subprocess.run(
        [sys.executable, "-c", code, saved, tmp_path / "expected.pt"],
        check=True,
        env={**os.environ, "PYTHONPATH": root},
    )


def test_it_is_the_same_bits_however_weights_lie_in_memory(tmp_path):
    """GPT-2 keeps [in, out]: slim's weights are transposed views, and products add up in the order of memory."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_embd=256, n_layer=1, n_head=4, vocab_size=300, bos_token_id=0, eos_token_id=0)
    compiled = slim.compile(GPT2LMHeadModel(config), target="eager")
    compiled.save(tmp_path / "model")
    again = slim.load(tmp_path / "model", target="eager")
    for length in (1, 5, 40):
        tokens = torch.randint(0, 300, (2, length))
        assert torch.equal(again(tokens).logits, compiled(tokens).logits)
    again.save(tmp_path / "model")  # once more, from and to the same place
    assert torch.equal(slim.load(tmp_path / "model", target="eager")(tokens).logits, compiled(tokens).logits)


def test_the_tokenizer_comes_along(shared, tmp_path):
    from transformers import AutoTokenizer

    slim.compile(shared / "models" / "stories260K", target="eager").save(tmp_path / "model")
    again = slim.load(tmp_path / "model", target="eager")
    tokenizer = AutoTokenizer.from_pretrained(again.program.facts.source)
    assert again.program.facts.source == tmp_path / "model"
    assert tokenizer.decode(tokenizer("Once upon a time").input_ids, skip_special_tokens=True) == "Once upon a time"


def test_the_program_is_text_for_people(saved):
    assert (saved / "program.py").read_text().startswith("# slim IR")
    manifest = json.loads((saved / MANIFEST).read_text())
    assert manifest["pipeline"] == 'fold_norms(), quantize("int8")'


def test_transformers_does_not_take_it_for_a_model_of_its_own(saved):
    from transformers import AutoModelForCausalLM

    with pytest.raises(OSError, match="no file named"):
        AutoModelForCausalLM.from_pretrained(saved)


def test_a_module_comes_back_too(tmp_path):
    module = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.GELU(), torch.nn.Linear(8, 2))
    compiled = slim.compile(module, example_inputs=torch.rand(3, 4), target="eager")
    compiled.save(tmp_path / "model")
    x = torch.rand(5, 4)
    assert torch.equal(slim.load(tmp_path / "model", target="eager")(x), compiled(x))


@pytest.mark.parametrize("limit", [1, 1000, 10**9])
def test_weights_are_spread_over_files_and_found_again(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(storage, "SHARD_BYTES", limit)
    tensors = {
        "a": torch.randn(10, 3), "b": torch.randn(4, 6).t(), "c": torch.randn(7).bfloat16(), "d": torch.tensor(3),
        "e": torch.zeros(0, 5), "f": torch.randint(-9, 9, (8, 2), dtype=torch.int8), "g": torch.randn(6, 8)[:, ::2],
        "h": torch.tensor([True, False]), "i": torch.randn(2, 3, 4).transpose(1, 2),
    }  # fmt: skip
    files = storage.write_weights(Weights(dict(tensors)), tmp_path, "weights")
    assert len(files) == {1: 9, 1000: 1, 10**9: 1}[limit]
    again = storage.stored_weights(files)
    for name, tensor in tensors.items():
        assert again.shape(name) == tuple(tensor.shape)
        assert again[name].dtype == tensor.dtype
        assert torch.equal(again[name], tensor)


# -- damage ------------------------------------------------------------------------------------------------------------


def damage_nothing_there(folder: Path) -> None:
    (folder / MANIFEST).unlink()


def damage_no_json(folder: Path) -> None:
    (folder / MANIFEST).write_text('{"format": 1, "fac')


def damage_missing_key(folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest["facts"]["tied"], manifest["pipeline"]
    (folder / MANIFEST).write_text(json.dumps(manifest))


def damage_missing_weights(folder: Path) -> None:
    (folder / "weights.safetensors").unlink()


def damage_truncated_weights(folder: Path) -> None:
    file = folder / "weights.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def damage_one_bit(folder: Path) -> None:
    file = folder / "weights.safetensors"
    data = bytearray(file.read_bytes())
    data[-50] ^= 1
    file.write_bytes(data)


def damage_program(folder: Path) -> None:
    text = (folder / "program.py").read_text().replace("slim.rms_norm", "os.system")
    (folder / "program.py").write_text(text)


def damage_program_and_its_checksum(folder: Path) -> None:
    damage_program(folder)
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"]["program.py"] = storage.checksum(folder / "program.py")
    (folder / MANIFEST).write_text(json.dumps(manifest))


DAMAGES = {name.removeprefix("damage_"): value for name, value in globals().items() if name.startswith("damage_")}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damage_is_found_and_named(saved, damage):
    damage(saved)
    with pytest.raises(errors.ArtifactCorrupt, match=str(saved)):
        load(saved)


@pytest.mark.parametrize("version", [0, 2, "one", None])
def test_another_version_is_refused(saved, version):
    manifest = json.loads((saved / MANIFEST).read_text())
    (saved / MANIFEST).write_text(json.dumps({**manifest, "format": version}))
    with pytest.raises(errors.ArtifactVersion, match=f"{version}; this slim reads 1"):
        load(saved)


def test_a_path_without_anything_is_not_found(tmp_path):
    with pytest.raises(errors.ModelNotFound):
        load(tmp_path / "nowhere")


def test_an_unknown_target_is_refused_before_anything_is_read(saved):
    damage_truncated_weights(saved)
    with pytest.raises(errors.UnknownTarget):
        load(saved, target="toaster")


# -- all or nothing ----------------------------------------------------------------------------------------------------


def full_disk(*args):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def interrupt(*args):
    raise KeyboardInterrupt


@pytest.mark.parametrize("place", ["new", "deep/er/new", "artifact"])
@pytest.mark.parametrize(
    ("failure", "error"), [(full_disk, errors.SaveFailed), (interrupt, KeyboardInterrupt)], ids=["disk", "ctrl-c"]
)
@pytest.mark.parametrize("when", ["fsync", "late"])
def test_a_failure_leaves_everything_as_it_was(compiled, tmp_path, monkeypatch, place, failure, error, when):
    if place == "artifact":
        compiled.save(tmp_path / place)
    before, folders = everything(tmp_path), sorted(tmp_path.rglob("*"))
    if when == "fsync":
        monkeypatch.setattr(os, "fsync", failure)
    else:
        monkeypatch.setattr("slim.runtime.artifact._manifest", failure)
    with pytest.raises(error):
        compiled.save(tmp_path / place)
    assert everything(tmp_path) == before
    assert sorted(tmp_path.rglob("*")) == folders


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_disk_that_is_full_is_named(compiled, tmp_path, monkeypatch):
    opened = Path.open

    def on_a_full_disk(self, mode="r", *args, **kwargs):
        return opened(
            Path("/dev/full") if "w" in mode and self.suffix == ".safetensors" else self, mode, *args, **kwargs
        )

    monkeypatch.setattr(Path, "open", on_a_full_disk)
    with pytest.raises(errors.SaveFailed, match="No space left on device"):
        compiled.save(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_an_artifact_is_replaced_as_a_whole(compiled, saved):
    (saved / "stray.txt").write_text("from an earlier version")
    compiled.save(saved)
    assert not (saved / "stray.txt").exists()
    assert [path.name for path in saved.parent.iterdir()] == ["model"]


def test_an_empty_directory_is_filled(compiled, tmp_path):
    (tmp_path / "model").mkdir()
    compiled.save(tmp_path / "model")
    assert is_artifact(tmp_path / "model")


def test_a_swap_that_fails_brings_the_old_one_back(compiled, saved, monkeypatch):
    before = everything(saved.parent)
    rename = Path.rename

    def failing(self, target):
        if self.name.startswith(".model.") and Path(target) == saved:
            full_disk()
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(errors.SaveFailed):
        compiled.save(saved)
    assert everything(saved.parent) == before


@pytest.mark.parametrize("place", ["file", "folder"])
def test_what_is_no_artifact_is_never_overwritten(compiled, tmp_path, place):
    (tmp_path / "file").write_text("precious")
    (tmp_path / "folder").mkdir()
    shutil.copy(tmp_path / "file", tmp_path / "folder")
    before = everything(tmp_path)
    for attempt in (compiled.save, check_destination):
        with pytest.raises(errors.SaveFailed):
            attempt(tmp_path / place)
    assert everything(tmp_path) == before
