"""--moe-trace and --moe-replay in fairseq-train: the criterion's forward says which batch the layers see."""

from typing import Any, Callable, Optional, Tuple

from torch import nn

from fairseq_sparsemixer.plugin.traces.following import Following
from fairseq_sparsemixer.plugin.traces.options import open_following, wanted


class TrainingFollower:
    """Follows a training and its validation. valid_subset is set by the trainer before each validation.

    num_updates: gives the number of updates done.
    """

    def __init__(self, following: Following, model: nn.Module, train_subset: str, interval: int, num_updates: Callable[[], int]):
        self.following, self.model, self.num_updates = following, model, num_updates
        self.train_subset, self.interval = train_subset, interval
        self.valid_subset = "valid"
        following.subset = train_subset
        following.attach(model)

    def before(self, criterion: nn.Module, arguments: Tuple[Any, ...]) -> None:
        """Before the criterion's forward: the batch begins."""
        following, num_updates = self.following, self.num_updates()
        following.training = criterion.training
        following.subset = self.train_subset if criterion.training else self.valid_subset
        following.updates = num_updates
        following.replaying = following.replay is not None and (criterion.training or following.replay.covers(following.subset))
        following.attach(self.model)
        due = not criterion.training or (self.interval > 0 and num_updates % self.interval == 0)
        following.recording = due and following.trace is not None
        if following.trace is not None:  # also before the first lines, which may come later: then it would seem to resume
            following.trace.start(resume=num_updates > 0)
        following.open_batch(arguments[1])

    def after(self, criterion: nn.Module, *_: Any) -> None:
        """After it. The backward pass recomputes layers of checkpointed activations, which must be replayed as before."""
        if self.following.recording and self.following.trace is not None:
            self.following.recording = False
            self.following.trace.flush()  # a training that is killed leaves whole batches
        if not criterion.training:
            self.following.close_batch()


def follow_training(
    cfg: Any, model: nn.Module, criterion: nn.Module, num_updates: Callable[[], int]
) -> Optional[TrainingFollower]:
    """Follow the model as the flags say; None without them. See TrainingFollower.

    Raises ConfigurationError for unusable flags and files.
    """
    flags = wanted(cfg)
    if flags is None:
        return None
    follower = TrainingFollower(open_following(flags), model, cfg.dataset.train_subset, flags.interval, num_updates)
    criterion.register_forward_pre_hook(follower.before)
    criterion.register_forward_hook(follower.after)
    return follower
