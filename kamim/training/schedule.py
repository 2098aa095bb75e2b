"""The learning rate schedule, from timm."""

from timm.scheduler import CosineLRScheduler
from torch.optim import Optimizer

from kamim.config.pretrain import Optim


def cosine(optimizer: Optimizer, optim: Optim, steps_per_epoch: int) -> CosineLRScheduler:
    """Returns a schedule of linear warm-up, a cosine to min_lr, then min_lr. step_update(step) depends on step only.

    The cosine is computed from step 0 and the warm-up replaces its beginning, as in the released code. With
    optim.COSINE_AFTER_WARMUP it is computed from the end of the warm-up.
    """
    _, warmup, end = optim.schedule(steps_per_epoch)
    return CosineLRScheduler(
        optimizer,
        t_initial=end - warmup if optim.COSINE_AFTER_WARMUP else end,
        lr_min=optim.min_lr,
        warmup_t=warmup,
        warmup_lr_init=optim.warmup_lr,
        warmup_prefix=optim.COSINE_AFTER_WARMUP,
        t_in_epochs=False,
    )
