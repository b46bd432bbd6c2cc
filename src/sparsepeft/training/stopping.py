"""Stopping a run so that nothing is lost."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback


class StopAfterStep(TrainerCallback):
    """Ends a run, when asked to, with a checkpoint after the step it is at.

    Example:
        >>> stop = StopAfterStep()
        >>> signal.signal(signal.SIGTERM, lambda *_: stop.ask(SystemExit(143)))
        >>> train(config, callbacks=[stop])
    """

    def __init__(self) -> None:
        self._is_training = False
        self._error: BaseException | None = None

    def ask(self, error: BaseException) -> bool:
        """Have the run end with ``error`` once the checkpoint is there.

        Returns:
            Whether it will; not where no step is being done, nor when it was asked before.
        """
        if not self._is_training or self._error is not None:
            return False
        self._error = error
        return True

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """From now on there are steps."""
        self._is_training, self._error = True, None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Have a checkpoint written."""
        if self._error is not None:
            control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End here."""
        if self._error is not None:
            raise self._error

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """No more steps."""
        self._is_training = False
