"""The command line as a user meets it: every command, and every mistake ends in slim's own words."""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from transformers import AutoModelForCausalLM, AutoTokenizer

import slim
from slim.cli import main
from slim.cli.progress import Steps
from slim.passes import PASSES
from slim.runtime.artifact import is_artifact, load
from slim.runtime.perplexity import pieces, score, windows

ROOT = Path(__file__).resolve().parents[2]
PROMPT = "Once upon a time"


def run(*args: object) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args])


def succeed(*args: object) -> Result:
    result = run(*args)
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture(scope="module")
def model(shared: Path) -> Path:
    return shared / "models" / "stories260K"


@pytest.fixture(scope="module")
def text(shared: Path) -> Path:
    return shared / "text" / "tinystories_val.txt"


@pytest.fixture(scope="module")
def artifact(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model after the lossless pass, saved by the command line."""
    folder = tmp_path_factory.mktemp("cli") / "small"
    result = succeed("compile", model, "-p", "fold_norms", "-o", folder)
    assert "fold_norms()" in result.stdout
    assert f"saved to {folder}" in result.stdout
    return folder


@pytest.fixture(scope="module")
def tokenizer(model: Path):
    return AutoTokenizer.from_pretrained(model)


@pytest.fixture(scope="module")
def original(model: Path):
    return AutoModelForCausalLM.from_pretrained(model).eval()


# -- compile -----------------------------------------------------------------------------------------------------------


def test_compile_reads_a_pipeline_from_a_file_and_dumps_every_stage(model: Path, tmp_path: Path) -> None:
    (tmp_path / "pipeline.txt").write_text('# lossless first\nfold_norms,\nquantize("int8")\n')
    options = ("-p", f"@{tmp_path / 'pipeline.txt'}", "--dump", tmp_path / "dump", "--target", "eager")
    result = succeed("compile", model, *options, "-o", tmp_path / "new" / "small")
    stages = ["00_lift.py", "01_fold_norms.py", "02_quantize.py", "generated", "report.json"]
    assert sorted(file.name for file in (tmp_path / "dump").iterdir()) == stages
    assert "def forward" in (tmp_path / "dump" / "generated" / "step_last" / "forward.py").read_text()
    assert load(tmp_path / "new" / "small").pipeline == 'fold_norms(), quantize("int8")'
    assert "lifting" in result.stderr
    assert "lifting" not in result.stdout


def test_the_report_fits_a_terminal_of_100_columns(artifact: Path) -> None:
    lines = str(load(artifact, target="eager").report).splitlines()
    table = lines[: next(i for i, line in enumerate(lines) if line.startswith("ms around the passes:"))]
    assert max(map(len, table)) <= 100


def test_an_artifact_is_replaced_by_a_new_one(artifact: Path, model: Path, tmp_path: Path) -> None:
    shutil.copytree(artifact, tmp_path / "small")
    succeed("compile", model, "-o", tmp_path / "small", "--no-verify")
    assert load(tmp_path / "small").pipeline == ""


# -- generate ----------------------------------------------------------------------------------------------------------


def test_generate_writes_what_transformers_writes(artifact: Path, original, tokenizer) -> None:
    tokens = tokenizer(PROMPT, return_tensors="pt").input_ids
    expected = tokenizer.decode(original.generate(tokens, max_new_tokens=24)[0], skip_special_tokens=True)
    streamed = succeed("generate", artifact, "--prompt", PROMPT, "--max-new-tokens", 24)
    at_once = succeed("generate", artifact, "--prompt", PROMPT, "--max-new-tokens", 24, "--no-stream")
    assert streamed.stdout.rstrip() == at_once.stdout.rstrip() == expected.rstrip()
    assert "24 tokens in" in streamed.stderr


def test_sampling_repeats_with_a_seed(artifact: Path) -> None:
    options = ("--prompt", PROMPT, "--max-new-tokens", 16, "--temperature", 1.5, "--top-k", 50, "--top-p", 0.95)
    once, again, other = (succeed("generate", artifact, *options, "--seed", seed).stdout for seed in (1, 1, 2))
    assert once == again != other


def test_temperature_zero_is_greedy(artifact: Path) -> None:
    greedy = succeed("generate", artifact, "--prompt", PROMPT, "--max-new-tokens", 8).stdout
    assert succeed("generate", artifact, "--prompt", PROMPT, "--max-new-tokens", 8, "--temperature", 0).stdout == greedy


# -- bench and eval ----------------------------------------------------------------------------------------------------


def test_bench_times_the_original_beside_it(artifact: Path, model: Path) -> None:
    sizes = ("--prompt-length", 16, "--new-tokens", 4, "--rounds", 2)
    result = succeed("bench", artifact, *sizes, "--against", model)
    for part in ("prefill best", "decode best", "(original)", "last / first", "16 read, 4 written, 2 rounds"):
        assert part in result.stdout
    assert "last / first" not in succeed("bench", artifact, *sizes).stdout
    assert max(map(len, result.stdout.splitlines())) <= 80


def shown_number(result: Result, name: str) -> float:
    found = re.search(rf"^{name} +([\d.,]+)$", result.stdout, re.MULTILINE)
    assert found, result.stdout
    return float(found[1].replace(",", ""))


def test_eval_by_pieces_gives_the_perplexity_of_the_original(artifact: Path, text: Path, original, tokenizer) -> None:
    result = succeed("eval", artifact, "--text", text, "--pieces", PROMPT, "--limit", 8)
    expected = score(original, pieces(text.read_text(), tokenizer, 512, PROMPT, 8))
    assert shown_number(result, "perplexity") == pytest.approx(expected.perplexity, abs=1e-4)
    assert shown_number(result, "tokens predicted") == expected.tokens


def test_eval_by_windows_gives_bits_per_byte(artifact: Path, text: Path, original, tokenizer) -> None:
    result = succeed("eval", artifact, "--text", text, "--max-tokens", 300, "--context", 128)
    expected = score(original, windows(text.read_text(), tokenizer, 128, 300))
    assert shown_number(result, "bits per byte") == pytest.approx(expected.bits_per_byte, abs=1e-4)
    assert shown_number(result, "windows of at most 128 tokens") == 3


def test_eval_and_export_say_that_how_tokens_are_kept_is_not_part_of_them(
    model: Path, text: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    compiled = slim.compile(model, target="eager", kv_cache=slim.KVCacheConfig(window=8, dtype="int8"))
    compiled.save(tmp_path / "ring")
    result = succeed("eval", tmp_path / "ring", "--text", text, "--max-tokens", 100)
    assert "KVCacheConfig(dtype='int8', window=8) costs nothing here" in result.stderr
    compiled.export(tmp_path / "out")
    assert "the export has no KVCacheConfig(dtype='int8', window=8)" in caplog.text


# -- inspect and passes ------------------------------------------------------------------------------------------------


def test_inspect_prints_the_ir_and_what_it_costs(artifact: Path, model: Path) -> None:
    lifted = succeed("inspect", model).stdout
    assert lifted.startswith("# slim IR")
    assert lifted.count("slim.attention.default(") == 5
    assert "FLOPs, decode" in lifted
    saved = succeed("inspect", artifact).stdout
    assert "slim.rms_norm.default(embedding, None" in saved
    passed = succeed("inspect", model, "-p", 'quantize("int8")').stdout
    assert "slim.dequantize.default(" in passed
    assert "since" in passed  # the report


def test_charts_are_printed_when_asked_for(model: Path, tmp_path: Path) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("Once upon a time there was a little girl.\n" * 40)
    pipeline = ("-p", 'gqa(2, method="procrustes")', "--calibration", texts)
    shown = succeed("inspect", model, *pipeline, "--charts").stdout
    assert "What merging kv heads loses (share of the energy by layer)" in shown
    assert "What merging kv heads loses" not in succeed("inspect", model, *pipeline).stdout
    assert "no pass made a chart" in succeed("inspect", model, "--charts").stdout


def test_rules_are_listed_when_asked_for(artifact: Path, model: Path) -> None:
    attention = re.compile(r"^ +5 +\d+  attention\(bias=visibility\(mask\)\) = ", re.MULTILINE)
    for subject in (artifact, model):
        told = succeed("inspect", subject, "--rules").stdout
        assert "rules of the lift" in told
        assert attention.search(told)


def test_passes_lists_every_option() -> None:
    shown = succeed("passes").stdout
    for kind in PASSES.values():
        assert kind.name in shown
        assert all(option.name in shown for option in dataclasses.fields(kind))
    assert '"int8" | "int4"' in shown
    assert max(map(len, shown.splitlines())) <= 80


# -- mistakes ----------------------------------------------------------------------------------------------------------


def fails(where: Path, *args: object) -> str:
    """The message of a command that fails, which leaves no file of its own in ``where``."""
    before = sorted(where.rglob("*"))
    result = run(*args)
    assert result.exit_code == 2, result.output
    assert sorted(where.rglob("*")) == before
    assert "Traceback" not in result.output
    assert result.stdout == ""
    message = result.stderr[result.stderr.index("error: ") :]
    assert "\n  hint: " in message
    return message


@pytest.mark.parametrize(
    ("pipeline", "said"),
    [
        ("quantise", "Did you mean 'quantize'"),
        ('quantize("int9")', "Did you mean 'int8'"),
        ("quantize(wieghts='int8')", "there is no such option"),
        ("quantize('int8', embeddings=True, head=False)", "contradict"),
        ("quantize(", "cannot read the pipeline at character"),
        ("__import__('os')", "there is no pass '__import__'"),
        ('quantize("int8", exclude=["no_such_weight"])', "matches no weight"),
        ('quantize("int8"), fold_norms', "cannot run here"),
        ("fold_norms, fold_norms", "matched none"),
        ("@no/such/file", "cannot use 'no/such/file' for -p"),
    ],
)
def test_a_bad_pipeline_is_refused(model: Path, tmp_path: Path, pipeline: str, said: str) -> None:
    assert said in fails(tmp_path, "compile", model, "-p", pipeline, "-o", tmp_path / "small")


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("bisect MODEL -p quantize --threshold -1", "-1.0 is not in the range x>=0"),
        ("bisect MODEL -p quantize --threshold nan", "nan is no number"),
        ("bisect MODEL", "there is nothing to look through"),
        ("bisect MODEL -p quantize,fold_norms", "cannot run here"),
        ("compile MODEL -o OUT -p quantize,fold_norms", "cannot run here"),
        ("compile MODEL -o FILE", "there is a file of that name"),
        ("compile MODEL -o OUT --dump FILE", "is no directory that can be written to"),
        ("compile MODEL -o OUT --target gpu", "there is no target 'gpu'"),
        ("generate MODEL --prompt x --target gpu", "there is no target 'gpu'"),
        ("generate MODEL --prompt x --temperature nan", "nan is no number"),
        ("generate MODEL --prompt x --seed 99999999999999999999", "is not in the range"),
        ("bench MODEL --target cpu --tune 3", "kernels are tuned on a GPU"),
        ("bench MODEL --tune inf", "inf is no number"),
        ("bench MODEL --against nowhere/else/at-all", "no model at 'nowhere/else/at-all'"),
        ("eval MODEL --text FILE --target gpu", "there is no target 'gpu'"),
        ("export MODEL -o FILE", "there is a file of that name"),
        ("export MODEL -o OUT --format compressed-tensors --dequantize", "contradict"),
        ("inspect MODEL -p quantize,fold_norms", "cannot run here"),
        ("inspect MODEL --html nowhere/page.html", "there is no directory nowhere"),
        ("inspect MODEL --html FILE.html --target gpu", "there is no target 'gpu'"),
        ("inspect MODEL --html FILE.html --charts", "--charts is for the terminal"),
        ("inspect MODEL --calibration FILE", "--calibration is for the passes"),
    ],
)
def test_options_that_no_model_could_suit_are_refused_before_one_is_read(
    tmp_path: Path, command: str, said: str
) -> None:
    (tmp_path / "file").write_text("something")
    places = {"MODEL": tmp_path / "absent", "OUT": tmp_path / "out", "FILE": tmp_path / "file"}
    result = run(*(re.sub("MODEL|OUT|FILE", lambda word: str(places[word[0]]), part) for part in command.split()))
    assert result.exit_code == 2, result.output
    assert said in result.output
    assert str(places["MODEL"]) not in result.output.partition("rror: ")[2]
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("command", ["compile", "generate", "bench", "eval", "inspect"])
def test_a_missing_model_is_told_by_every_command(tmp_path: Path, text: Path, command: str) -> None:
    needed = {"compile": ("-o", tmp_path / "out"), "generate": ("--prompt", "x"), "eval": ("--text", text)}
    message = fails(tmp_path, command, tmp_path / "nowhere", *needed.get(command, ()))
    assert f"no model at '{tmp_path / 'nowhere'}'" in message


def test_a_directory_of_other_files_is_not_overwritten(model: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("precious")
    message = fails(tmp_path, "compile", model, "-o", tmp_path / "thesis")
    assert "holds other files" in message
    assert (tmp_path / "thesis" / "chapter1.tex").read_text() == "precious"


def test_unknown_and_unavailable_targets_are_refused(model: Path, tmp_path: Path) -> None:
    assert "there is no target 'gpu'" in fails(tmp_path, "compile", model, "--target", "gpu", "-o", tmp_path / "small")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("absent.txt", None, "No such file"),
        ("image.txt", b"\xff\xfe\x00", "not UTF-8"),
        ("empty.txt", b" \n\n ", "holds no text"),
        ("list.jsonl", b'{"text": "fine"}\n["text"]\n', "line 2 is not JSON such as"),
    ],
)
def test_bad_calibration_is_refused(model: Path, tmp_path: Path, name: str, content: bytes | None, said: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    options = ("-p", "fold_norms", "--calibration", tmp_path / name, "-o", tmp_path / "small")
    assert said in fails(tmp_path, "compile", model, *options)


def test_a_pass_that_needs_data_says_which_option_gives_it_and_takes_it(
    model: Path, text: Path, tmp_path: Path
) -> None:
    options = ("-p", 'quantize("int4", method="gptq")', "--target", "eager", "-o", tmp_path / "small")
    assert "--calibration FILE" in fails(tmp_path, "compile", model, *options)
    (tmp_path / "some.txt").write_text(text.read_text()[:30_000])
    told = succeed("compile", model, *options, "--calibration", tmp_path / "some.txt").stdout
    assert "calibration tokens" in told
    assert "int4 by gptq" in told


def test_a_compiled_model_is_exported_for_other_libraries(model: Path, tmp_path: Path) -> None:
    succeed("compile", model, "-p", 'quantize("int8")', "--target", "eager", "-o", tmp_path / "small")
    told = succeed("export", tmp_path / "small", "-o", tmp_path / "out", "--format", "compressed-tensors").stdout
    assert f"exported to {tmp_path / 'out'}" in told
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    assert "compressed-tensors" in fails(tmp_path, "export", tmp_path / "small", "-o", tmp_path / "plain")


def test_an_empty_prompt_is_refused(artifact: Path, tmp_path: Path) -> None:
    assert "the prompt is empty" in fails(tmp_path, "generate", artifact, "--prompt", "")


def test_contradictory_options_are_refused(artifact: Path, text: Path, tmp_path: Path) -> None:
    sampling = ("--temperature", 0, "--top-k", 5)
    assert "--top-k contradict" in fails(tmp_path, "generate", artifact, "--prompt", "x", *sampling)
    for options in (("--limit", 5), ("--pieces", "Once", "--max-tokens", 5)):
        assert "contradict" in fails(tmp_path, "eval", artifact, "--text", text, *options)


def test_a_text_without_the_marker_is_refused(artifact: Path, text: Path, tmp_path: Path) -> None:
    options = ("--text", text, "--pieces", "It was a dark and stormy night")
    assert "no paragraph of it begins with" in fails(tmp_path, "eval", artifact, *options)


def test_the_tokenizer_of_another_model_is_told_by_its_tokens(artifact: Path, shared: Path, tmp_path: Path) -> None:
    small = tmp_path / "babyllama"
    shutil.copytree(shared / "models" / "babyllama361", small)
    for file in small.iterdir():
        file.chmod(0o644)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(artifact / name, small / name)
    message = fails(tmp_path, "generate", small, "--prompt", "Once upon a time, there was a little girl")
    assert "is outside the vocabulary of 361" in message


def test_a_model_without_tokenizer_says_so(artifact: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(artifact, bare, ignore=shutil.ignore_patterns("tokenizer*"))
    manifest = json.loads((bare / "slim.json").read_text())
    manifest["files"] = {name: value for name, value in manifest["files"].items() if "tokenizer" not in name}
    (bare / "slim.json").write_text(json.dumps(manifest))
    assert "no tokenizer beside the model" in fails(tmp_path, "generate", bare, "--prompt", "x")


@pytest.mark.parametrize("command", ["generate", "bench", "inspect"])
def test_an_artifact_of_another_version_is_refused(artifact: Path, tmp_path: Path, command: str) -> None:
    old = tmp_path / "old"
    shutil.copytree(artifact, old)
    manifest = json.loads((old / "slim.json").read_text()) | {"format": 999}
    (old / "slim.json").write_text(json.dumps(manifest))
    needed = {"generate": ("--prompt", "x")}
    assert "has format version 999" in fails(tmp_path, command, old, *needed.get(command, ()))


def test_debug_shows_the_traceback_wherever_it_stands(tmp_path: Path) -> None:
    for args in (["--debug", "inspect", tmp_path / "x"], ["inspect", tmp_path / "x", "--debug"]):
        result = run(*args)
        assert result.exit_code == 2
        assert "Traceback (most recent call last)" in result.stderr
        assert "ModelNotFound" in result.stderr


def test_a_bad_number_is_click_s_business_and_also_ends_with_2(artifact: Path) -> None:
    result = run("generate", artifact, "--prompt", "x", "--max-new-tokens", 0)
    assert result.exit_code == 2
    assert "0 is not in the range x>=1" in result.stderr


# -- as a process ------------------------------------------------------------------------------------------------------


def process(*args: object, **options) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "slim", *map(str, args)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command, env=environment, **pipes, **options)


def test_help_does_not_wait_for_torch() -> None:
    code = "import sys, slim.cli; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_a_process_generates_text(artifact: Path) -> None:
    with process("generate", artifact, "--prompt", PROMPT, "--max-new-tokens", 8) as running:
        out, err = running.communicate(timeout=90)
    assert running.returncode == 0, err
    assert out.startswith(PROMPT)
    assert len(out) > len(PROMPT) + 8


@pytest.fixture
def _heeds_ctrl_c() -> Iterator[None]:
    """A shell's background jobs, and what they start, ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_heeds_ctrl_c")
def test_ctrl_c_counts_where_a_library_swallows_it() -> None:
    with Steps() as steps:
        with contextlib.suppress(BaseException):  # as some libraries do
            signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            steps.stage("saving")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.usefixtures("_heeds_ctrl_c")
def test_ctrl_c_ends_with_one_line_and_leaves_nothing(model: Path, tmp_path: Path) -> None:
    with process("compile", model, "-p", 'quantize("int8")', "-o", tmp_path / "small") as running:
        lines = [running.stderr.readline()]
        assert lines[0].startswith("lifting"), lines
        time.sleep(0.5)
        running.send_signal(signal.SIGINT)
        out, err = running.communicate(timeout=90)
    assert running.returncode == 130, err
    assert err.splitlines()[-1] == "interrupted"
    assert "Traceback" not in err
    assert out == ""
    assert list(tmp_path.iterdir()) == []


def test_an_artifact_is_one(artifact: Path, model: Path) -> None:
    assert is_artifact(artifact)
    assert not is_artifact(model)
