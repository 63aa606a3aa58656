"""Scale moves on the zoo: every architecture keeps its function, and how many linears get a scale is known."""

import pytest
import torch

from slim.compiler.probe import make_probe
from slim.compiler.scaling import scale_sites, settle
from slim.compiler.uses import EXPERTS, LINEAR
from slim.compiler.verify import verify
from tests.compiled import lifted

pytestmark = pytest.mark.slow

# name -> (sites, linears that read one, all linears)
KNOWN = {
    "llama-biases": (9, 15, 15),
    "qwen3": (9, 15, 15),
    "gemma2": (8, 14, 15),  # the head is tied to the embedding
    "gemma3": (8, 14, 15),
    "phi3": (9, 15, 15),
    "olmo": (7, 13, 15),  # clips values
    "olmo2": (5, 5, 15),  # norms stand behind the linears
    "cohere": (6, 14, 15),
    "nemotron": (9, 13, 13),  # the square of ReLU
    "bitnet": (9, 15, 15),
    "nanochat": (9, 13, 13),  # norms without a gain
    "minicpm3": (12, 20, 21),  # latent attention
    "gpt_neox": (7, 11, 13),
    "gptj": (5, 15, 17),
    "opt": (9, 13, 15),
    "bloom": (6, 10, 13),
    "falcon": (4, 6, 9),  # one fused projection, of which the values are scaled
    "falcon-newdecoder": (6, 6, 9),
    "gpt_bigcode": (6, 6, 9),
    "qwen2_moe": (11, 25, 25),
    "gpt_oss": (7, 13, 15),  # adds one to what the gate multiplies
    "deepseek_v2": (14, 25, 25),
    "granitemoeshared": (11, 23, 23),
    "bert": (2, 2, 13),  # norms feed the residual too
    "albert": (1, 1, 14),  # layers share their weights
    "modernbert": (7, 11, 14),
}


@pytest.mark.parametrize("name", KNOWN)
def test_models_keep_their_function_and_every_linear_has_a_scale_or_a_reason(name: str) -> None:
    before = lifted(name)
    after = before.copy()
    sites, skips = scale_sites(after)
    linears = list(after.nodes(LINEAR, EXPERTS))
    readers = [reader.node for site in sites for reader in site.readers]
    assert (len(sites), len(readers), len(linears)) == KNOWN[name], skips
    assert len(set(readers)) == len(readers)
    assert bool(skips) == (len(readers) < len(linears))
    generator = torch.Generator().manual_seed(0)
    for site in sites:
        site.apply(after, torch.exp(torch.randn(site.size, generator=generator)))
    settle(after)
    verify(after, "scaling")
    probe = make_probe(before)
    assert probe.error(probe.run(before), probe.run(after)) < 1e-5
