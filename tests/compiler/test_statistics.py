"""One collector for all passes: the sums it keeps, how it walks, and what it takes as calibration data."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx

from slim import errors
from slim.compiler.passes_base import Context
from slim.compiler.program import Program, Streaming
from slim.compiler.statistics import Block, calibration_of, collect, readers, site_values, walk
from slim.compiler.statistics import checkpoint as checkpoints
from slim.compiler.statistics.accumulate import Accumulator, Wanted
from slim.compiler.statistics.segments import cuts
from slim.compiler.uses import EXPERTS, LINEAR
from tests import programs

TOKENS = [torch.randint(3, 96, (2, 11), generator=torch.Generator().manual_seed(i)) for i in range(3)]


def sites(program: Program) -> list[fx.Node]:
    return site_values(list(program.nodes(LINEAR, EXPERTS)))


class Recorded(Streaming):
    """Runs a Program node by node and keeps the rows of its sites."""

    def __init__(self, program: Program, also: str = "") -> None:
        super().__init__(program)
        self.wanted = {node.name for node in sites(program)} | {also}
        self.rows: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name in self.wanted:
            self.rows[n.name] = value
        return value


def recorded(
    program: Program, batches: list[Any], masks: list[Tensor] | None = None, also: str = ""
) -> dict[str, Tensor]:
    """Site -> all of its rows that are no padding."""
    found: dict[str, list[Tensor]] = {}
    for index, batch in enumerate(batches):
        run = Recorded(program, also)
        with torch.no_grad():
            run.run(*batch.inputs)
        for name, value in run.rows.items():
            rows = value.reshape(-1, value.shape[-1]) if masks is None else value[masks[index].bool()]
            found.setdefault(name, []).append(rows)
    return {name: torch.cat(parts) for name, parts in found.items()}


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma", "phi3", "gpt_neox", "mixtral"])
def test_sums_are_those_of_all_rows_at_once(name: str) -> None:
    program = programs.lifted(name)
    ctx = Context(calibration=TOKENS)
    values = sites(program)
    found = collect(program, values, ctx, asked_by="test", gram=True)
    rows = recorded(program, list(ctx.batches.batches))
    assert len(found) == len(values) > 3
    for value, statistics in found.items():
        x = rows[value.name].float()
        assert statistics.count == len(x)
        assert torch.equal(statistics.absmax, x.abs().amax(0))
        torch.testing.assert_close(statistics.mean, x.mean(0), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(statistics.absmean, x.abs().mean(0), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(statistics.gram, x.T @ x / len(x), atol=1e-4, rtol=1e-4)


@given(st.lists(st.integers(0, 40), min_size=1, max_size=5).filter(lambda counts: sum(counts) > 0), st.integers(1, 20))
@settings(max_examples=30, deadline=None)
def test_batches_do_not_matter_to_sums_and_the_sample_holds_rows_that_there_were(
    counts: list[int], wanted: int
) -> None:
    parts = [torch.randn(count, 5) for count in counts]
    sums = Accumulator("site", 5, Wanted(gram=True, rows=wanted))
    for part in parts:
        sums.add(part)
    found, x = sums.finish(), torch.cat(parts)
    assert found.rows is not None
    torch.testing.assert_close(found.gram, x.T @ x / len(x), atol=1e-4, rtol=1e-4)
    assert len(found.rows) == min(wanted, len(x))
    assert all(bool((row == x).all(1).any()) for row in found.rows)
    assert len({tuple(row.tolist()) for row in found.rows}) == len(found.rows)


def test_pad_tokens_are_left_out() -> None:
    program = programs.lifted("llama")
    mask = torch.ones(2, 11, dtype=torch.int64)
    mask[1, :4] = 0
    ctx = Context(calibration=[{"input_ids": TOKENS[0], "attention_mask": mask}])
    found = collect(program, sites(program), ctx, asked_by="test")
    rows = recorded(program, list(ctx.batches.batches), [mask])
    for value, statistics in found.items():
        assert statistics.count == 18
        assert torch.equal(statistics.absmax, rows[value.name].float().abs().amax(0))


def test_what_was_collected_serves_the_next_pass_and_more_is_collected_when_more_is_asked() -> None:
    program = programs.lifted("llama")
    told: list[str] = []
    ctx = Context(calibration=TOKENS, progress=lambda what, done, total: told.append(what))
    first = collect(program, sites(program), ctx, asked_by="one")
    again = collect(program, sites(program), ctx, asked_by="two")
    assert all(again[value] is statistics for value, statistics in first.items())
    assert set(told) == {"one: calibrating"}
    assert all(s.gram is not None for s in collect(program, sites(program), ctx, asked_by="three", gram=True).values())


# -- walking -----------------------------------------------------------------------------------------------------------


def test_a_stretch_is_a_layer_and_only_the_residual_stream_lies_between() -> None:
    program = programs.lifted("llama", num_hidden_layers=3)
    values = sites(program)
    blocks = list(walk(program, values, Context(calibration=TOKENS), asked_by="test", changes=False))
    assert [len(block.values) for block in blocks] == [4, 4, 5]
    found = cuts(program, [readers(value) for value in values])
    assert [cut.target for cut in found] == [torch.ops.slim.rms_norm.default] * 2


def test_linears_over_the_same_rows_are_never_cut_apart() -> None:
    program = programs.lifted("llama")
    values = sites(program)
    blocks = list(walk(program, values, Context(calibration=TOKENS), asked_by="test", grain="site", changes=False))
    assert [block.values for block in blocks] == [[value] for value in values]


@pytest.mark.parametrize("grain", ["block", "site"])
def test_later_statistics_are_those_of_the_program_as_rewritten(grain: Any) -> None:
    program, untouched = (programs.lifted("llama", num_hidden_layers=3) for _ in range(2))
    ctx = Context(calibration=TOKENS)
    seen: dict[str, Any] = {}
    for block in walk(program, sites(program), ctx, asked_by="test", gram=True, cross=True, grain=grain):
        last = block.values[0].name  # what comes behind it in its block sees that block as it was
        for value, statistics in block.statistics.items():
            seen[value.name] = statistics
            for linear in readers(value):
                name = str(linear.args[1].target)  # type: ignore[union-attr]
                program.weights[name] = program.weights[name] * 0.9
    batches = list(ctx.batches.batches)
    before, after = recorded(untouched, batches)[last], recorded(program, batches)[last]
    torch.testing.assert_close(seen[last].gram, after.T @ after / len(after), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(seen[last].cross, before.T @ after / len(after), atol=1e-4, rtol=1e-4)
    assert float((before - after).abs().max()) > 0.01


def test_what_a_stream_beside_a_site_has_lost_is_held_against_the_site_s_rows() -> None:
    program, untouched = (programs.lifted("llama", num_hidden_layers=2) for _ in range(2))
    values = sites(program)
    first, last = values[1], values[-2]  # what enters the first output projection, and the last down projection
    ((stream, *_),) = [n.all_input_nodes for n in program.graph.nodes if readers(last)[0] in n.all_input_nodes]
    ctx = Context(calibration=TOKENS)
    for block in walk(
        program, [first, last], ctx, asked_by="test", gram=True, cross=True, dense=True, grain="site",
        beside={last: [stream]},
    ):  # fmt: skip
        (value,) = block.values
        found = block.statistics[value]
        name = str(readers(value)[0].args[1].target)  # type: ignore[union-attr]
        program.weights[name] = program.weights[name] * 0.5
    program.weights[name] = program.weights[name] * 2.0
    batches = list(ctx.batches.batches)
    before, after = recorded(untouched, batches, also=stream.name), recorded(program, batches, also=stream.name)
    lost = before[stream.name] - after[stream.name]
    assert float(lost.abs().max()) > 0.01
    dense = torch.cat([before[last.name], lost], -1)
    torch.testing.assert_close(found.cross, dense.T @ after[last.name] / len(dense), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.dense_gram, dense.T @ dense / len(dense), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.dense_mean, dense.mean(0), atol=1e-4, rtol=1e-4)


def test_what_was_meant_may_be_a_copy_from_before_the_graph_changed() -> None:
    """As where a table has been rounded before the walk: the copy's rows are what the others are held against."""
    program = programs.lifted("llama", num_hidden_layers=2)
    meant, untouched = program.copy(), program.copy()
    (table,) = program.nodes(torch.ops.aten.embedding.default)
    doubled = program.insert(table.next, torch.ops.aten.mul.Tensor, table, 1.5, like=table)
    table.replace_all_uses_with(doubled, delete_user_cb=lambda user: user is not doubled)
    values, ctx = sites(program), Context(calibration=TOKENS)
    walked = walk(program, values, ctx, asked_by="test", gram=True, meant=meant, grain="site")
    seen = {value.name: found for block in walked for value, found in block.statistics.items()}
    before, after = (recorded(each, list(ctx.batches.batches)) for each in (untouched, program))
    for name, found in seen.items():
        torch.testing.assert_close(found.cross, before[name].T @ after[name] / len(after[name]), atol=1e-4, rtol=1e-4)
    assert max(float((before[name] - after[name]).abs().max()) for name in seen) > 0.01


def test_weights_of_a_stretch_are_read_once_and_dropped() -> None:
    program = programs.lifted("llama", num_hidden_layers=3)
    counted = {name: programs.Counted(program.weights[name]) for name in program.weights}
    for name, weight in counted.items():
        program.weights[name] = weight
    programs.Counted.reset()
    list(walk(program, sites(program)[:9], Context(calibration=TOKENS), asked_by="test", changes=False))
    marking = 1  # the checkpoint's name is made of all weights, read one at a time
    assert max(weight.reads for weight in counted.values() if len(weight.shape) > 1) == 1 + marking
    assert programs.Counted.most < len(counted) / 2


def test_a_plain_module_is_walked_too() -> None:
    weights = {f"w{i}": torch.randn(8, 8) for i in range(9)}
    lines = "".join(
        f"y{i} = aten.linear.default({f'z{i - 1}' if i else 'x'}, weights['w{i}'])\nz{i} = aten.relu.default(y{i})\n"
        for i in range(9)
    )
    program = programs.program(lines + "return (z8,)", weights)
    data = [torch.randn(2, 5, 8) for _ in range(2)]
    ctx = Context(calibration=data)
    blocks = list(walk(program, sites(program), ctx, asked_by="test", changes=False))
    assert [len(block.values) for block in blocks] == [4, 4, 1]
    rows = torch.cat(data).reshape(-1, 8)
    torch.testing.assert_close(blocks[0].statistics[blocks[0].values[0]].mean, rows.mean(0), atol=1e-5, rtol=1e-5)


# -- interrupted -------------------------------------------------------------------------------------------------------


def doubled(program: Program, ctx: Context, stop: int | None = None) -> Iterator[Block]:
    """Multiplies every weight, block by block, as a pass that can be resumed does."""
    for index, block in enumerate(walk(program, sites(program), ctx, asked_by="test", gram=True, cross=True)):
        if index == stop:
            raise KeyboardInterrupt
        for value in block.values:
            for linear in readers(value):
                name = str(linear.args[1].target)  # type: ignore[union-attr]
                if not block.restored:
                    block.results[name] = program.weights[name] * 1.1
                program.weights[name] = block.results[name]
        yield block


def test_an_interrupted_walk_goes_on_where_it_was(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "EVERY", 0.0)
    whole, broken, resumed = (programs.lifted("llama", num_hidden_layers=4) for _ in range(3))
    wanted = [block.statistics for block in doubled(whole, Context(calibration=TOKENS))]
    assert list(empty_cache.rglob("*.safetensors")) == []
    with pytest.raises(KeyboardInterrupt):
        list(doubled(broken, Context(calibration=TOKENS), stop=2))
    assert len(list(empty_cache.rglob("*.safetensors"))) == 1
    blocks = list(doubled(resumed, Context(calibration=TOKENS)))
    assert [block.restored for block in blocks] == [True, True, False, False]
    for statistics, block in zip(wanted[2:], blocks[2:], strict=True):
        for a, b in zip(statistics.values(), block.statistics.values(), strict=True):
            assert torch.equal(a.gram, b.gram)
            assert torch.equal(a.cross, b.cross)
    assert all(torch.equal(whole.weights[name], resumed.weights[name]) for name in whole.weights)
    assert list(empty_cache.rglob("*.safetensors")) == []


def test_an_interrupted_collection_goes_on_with_the_same_statistics(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "EVERY", 0.0)
    program = programs.lifted("llama", num_hidden_layers=4)
    wanted = collect(program, sites(program), Context(calibration=TOKENS), asked_by="other", gram=True, rows=4)

    def stop(what: str, done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    ctx = Context(calibration=TOKENS, progress=stop)
    with pytest.raises(KeyboardInterrupt):
        collect(program, sites(program), ctx, asked_by="test", gram=True, rows=4)
    steps: list[int] = []
    ctx = Context(calibration=TOKENS, progress=lambda what, done, total: steps.append(done))
    found = collect(program, sites(program), ctx, asked_by="test", gram=True, rows=4)
    assert len(steps) < 9  # of twelve, and one that ends them
    for value in wanted:
        a, b = wanted[value].tensors(""), found[value].tensors("")
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_checkpoint_of_other_weights_or_data_is_not_taken(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "EVERY", 0.0)
    with pytest.raises(KeyboardInterrupt):
        list(doubled(programs.lifted("llama", num_hidden_layers=3), Context(calibration=TOKENS), stop=2))
    blocks = list(doubled(programs.lifted("llama", num_hidden_layers=3), Context(calibration=TOKENS[:2])))
    assert not any(block.restored for block in blocks)


def test_a_damaged_checkpoint_is_not_taken(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "EVERY", 0.0)
    with pytest.raises(KeyboardInterrupt):
        list(doubled(programs.lifted("llama", num_hidden_layers=3), Context(calibration=TOKENS), stop=2))
    (file,) = empty_cache.rglob("*.safetensors")
    file.write_bytes(file.read_bytes()[:100])
    assert not any(
        b.restored for b in doubled(programs.lifted("llama", num_hidden_layers=3), Context(calibration=TOKENS))
    )


# -- what users give ---------------------------------------------------------------------------------------------------


def test_texts_become_windows_of_the_model_s_context_that_begin_with_bos(shared: Path) -> None:
    from slim.compiler.lift import lift_path

    program = lift_path(shared / "models" / "stories260K")
    text = "Once upon a time there was a little girl. " * 120
    found = calibration_of(program, Context(calibration=[text, text]), "test")
    rows = [row for batch in found.batches for row in batch.inputs[0]]
    assert all(len(row) <= 512 and row[0] == 1 for row in rows)
    assert found.tokens == sum(int(batch.real.sum()) for batch in found.batches) > 2000
    assert found.notes == []


def test_a_text_shorter_than_a_window_is_used_and_noted() -> None:
    found = calibration_of(_demo(), Context(calibration=["def main():\n    return 1\n"]), "test")
    assert found.tokens < 512
    assert "more text helps" in found.notes[0]


def _demo() -> Program:
    from slim.compiler.lift import lift_path

    return lift_path("examples/demo_model")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], "empty"),
        ("one text", "list of texts"),
        (["", ""], "no token"),
        (7, "no list"),
        ([7], "no tensor"),
        (["text", torch.ones(1, 3, dtype=torch.int64)], "texts stand among texts"),
        ([torch.ones(2, 3)], "integers"),
        ([torch.zeros(1, 0, dtype=torch.int64)], r"calibration\[0\].*holds no token"),
        ([torch.full((1, 3), 10**6)], "token"),
        ([{"attention_mask": torch.ones(1, 3)}], "input_ids"),
        ([{"input_ids": "text"}], "tensors"),
    ],
)
def test_bad_calibration_is_refused_with_the_reason(given: Any, said: str) -> None:
    with pytest.raises(errors.SlimError, match=said):
        calibration_of(_demo(), Context(calibration=given), "test")


def test_no_calibration_is_refused() -> None:
    program = programs.lifted("llama")
    with pytest.raises(errors.NeedsCalibration, match=r"test needs calibration data.*\n.*calibration=\[...\]"):
        collect(program, sites(program), Context(), asked_by="test")


def test_an_infinite_activation_is_refused_by_name() -> None:
    program = programs.program(
        "y = aten.mul.Tensor(x, 1e38)\nz = aten.linear.default(y, weights['first.weight'])\nreturn (z,)",
        {"first.weight": torch.ones(4, 8)},
    )
    data = torch.ones(1, 2, 8)
    data[0, 1, 3] = 1e5
    with pytest.raises(errors.NonFiniteActivation, match=r"channel 3.*first.weight"):
        collect(program, sites(program), Context(calibration=[data]), asked_by="test")


def test_a_dataloader_serves_and_what_the_model_does_not_read_is_noted() -> None:
    loader = torch.utils.data.DataLoader([{"input_ids": row, "labels": row} for row in TOKENS[0]], batch_size=2)
    found = calibration_of(programs.lifted("llama"), Context(calibration=loader), "test")
    assert found.tokens == 22
    assert found.notes == ["calibration holds labels, which the model does not read"]
