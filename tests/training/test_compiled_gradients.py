"""Compiled gradients of a single sample, against those that eager mode computes."""

import copy

import pytest
import torch
from runs import WORLD
from torch import Tensor, nn

from kamim.config.pretrain import Compute
from kamim.runtime.device import parallel


class Tokens(nn.Module):
    """A ViT's sum of class token, registers and positions, without the rest of it, which takes a minute to compile."""

    def __init__(self) -> None:
        super().__init__()
        for name, count in (("cls_token", 1), ("reg_token", 2), ("pos_embed", 7), ("offset", 7)):
            setattr(self, name, nn.Parameter(torch.randn(1, count, 3)))

    def forward(self, patches: Tensor) -> Tensor:
        """patches: [B, 4, 3]. Returns [B, 7, 3]."""
        count = len(patches)
        prefix = [self.cls_token.expand(count, -1, -1), self.reg_token.expand(count, -1, -1)]
        return (torch.cat([*prefix, patches], dim=1) + self.pos_embed + self.offset).sin()


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_compiled_gradients_of_one_sample_share_no_memory() -> None:
    torch.manual_seed(0)
    eager = Tokens()
    model = copy.deepcopy(eager)
    compiled = parallel(model, Compute(compile=True, precision="fp32"), WORLD)
    for _ in range(2):  # micro-batches of one sample: the second adds to the gradients of the first
        patches = torch.randn(1, 4, 3)
        for network in (eager, compiled):
            network(patches).square().sum().backward()
    for one in (eager, model):
        nn.utils.clip_grad_norm_(one.parameters(), 0.1)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, dict(eager.named_parameters())[name].grad)
    assert len({parameter.grad.untyped_storage().data_ptr() for parameter in model.parameters()}) == 4
