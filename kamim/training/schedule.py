"""Learning rate by optimiser step, through timm's scheduler."""

from timm.scheduler import CosineLRScheduler
from torch.optim import Optimizer

from kamim.training.config import Optim


def cosine(optimizer: Optimizer, optim: Optim, steps_per_epoch: int) -> CosineLRScheduler:
    """Linear warm-up, a cosine to min_lr, then min_lr. scheduler.step_update(step) is a pure function of step.

    The cosine's clock runs from step 0 and the warm-up stands in for its beginning, as the released code has it.
    """
    _, warmup, end = optim.schedule(steps_per_epoch)
    return CosineLRScheduler(
        optimizer, t_initial=end, lr_min=optim.min_lr, warmup_t=warmup, warmup_lr_init=optim.warmup_lr,
        t_in_epochs=False,
    )  # fmt: skip
