"""Where heads look is what transformers itself says they do, padding aside."""

import copy

import torch

from slim.compiler.statistics.attention import attended
from slim.compiler.statistics.batches import first_batches, read_calibration
from tests import programs

TOKENS = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(0))


def test_reach_and_likeness_are_those_of_the_attention_that_transformers_returns() -> None:
    mask = torch.ones_like(TOKENS)
    mask[1, 9:] = 0
    program = programs.lifted("llama")
    model = copy.deepcopy(programs.model("llama"))
    model.set_attn_implementation("eager")
    with torch.no_grad():
        given = model(TOKENS, attention_mask=mask, output_attentions=True).attentions
    nodes = program.attention_nodes()
    calibration = read_calibration(program, [{"input_ids": TOKENS, "attention_mask": mask}])
    found = attended(program, nodes, calibration.batches)
    for node, weights in zip(nodes, given, strict=True):
        looks = weights * mask[:, None, :, None]
        reach = torch.stack([looks.diagonal(-d, 2, 3).sum((0, 2)) for d in range(12)], 1)
        torch.testing.assert_close(found[node].reach, (reach / mask.sum()).double(), atol=1e-5, rtol=1e-4)
        flat = torch.nn.functional.normalize(looks.transpose(0, 1).flatten(1), dim=1)
        torch.testing.assert_close(found[node].alike, (flat @ flat.T).double(), atol=1e-5, rtol=1e-4)


def test_no_more_batches_are_looked_at_than_asked_for() -> None:
    program = programs.lifted("llama")
    batches = read_calibration(program, [TOKENS] * 5).batches
    assert len(first_batches(batches, 24)) == 1
    assert len(first_batches(batches, 25)) == 2
    assert len(first_batches(batches, 10_000)) == len(batches)
