"""The blocks of a model, read off its graph: pre-norm, post-norm, and where there are none."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slim.compiler.lift import lift
from slim.compiler.stack import Settings, find_blocks, take_out
from slim.compiler.verify import verify


class Residual(nn.Module):
    """x + f(norm(x)), or norm(x + f(x))."""

    def __init__(self, post: bool) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)
        self.post = post

    def forward(self, x: Tensor) -> Tensor:
        y = self.down(torch.relu(self.up(x if self.post else self.norm(x))))
        result: Tensor = self.norm(x + y) if self.post else x + y
        return result


class Stack(nn.Module):
    """Blocks between two linears; ``first`` adds what the first one made to what each block reads."""

    def __init__(self, post: bool = False, first: bool = False) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(4, 8), nn.Linear(8, 4)
        self.blocks = nn.ModuleList(Residual(post) for _ in range(4))
        self.first = first

    def forward(self, x: Tensor) -> Tensor:
        x = begin = self.enter(x)
        for block in self.blocks:
            x = block(x + begin if self.first else x)
        result: Tensor = self.leave(x)
        return result


def stack(**options: Any) -> Stack:
    torch.manual_seed(0)
    return Stack(**options).eval()


@pytest.mark.parametrize("post", [False, True])
def test_blocks_are_what_one_value_leads_into_and_out_of(post: bool) -> None:
    model = stack(post=post)
    program = lift(model, (torch.randn(3, 4),))
    blocks = find_blocks(program)
    assert [str(block) for block in blocks] == [f"blocks.{i}" for i in range(4)]
    assert all(len(block.weights) == 6 for block in blocks)
    take_out(program, blocks[1:3])
    verify(program, "removal")
    del model.blocks[1:3]
    assert set(model.state_dict()) == set(program.weights)
    x = torch.randn(5, 4)
    with torch.no_grad():
        assert torch.allclose(program.run(x)[0], model(x), atol=1e-6)


def test_where_a_value_passes_by_all_blocks_there_are_none() -> None:
    assert find_blocks(lift(stack(first=True), (torch.randn(3, 4),))) == []


def test_settings_tell_blocks_apart_that_compute_alike() -> None:
    model = stack()
    model.blocks[2].norm.eps = 0.1  # type: ignore[union-attr]
    program = lift(model, (torch.randn(3, 4),))
    settings = Settings(program)
    first, second, third, last = map(settings.of, find_blocks(program))
    assert first == second == last != third
