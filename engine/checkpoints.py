"""The checkpoints of a run: each takes its name when all ranks have written it, then the oldest are deleted.

With several processes a checkpoint can be written while the next steps run. At most one is on its way: it is
awaited before the next one begins and before the run ends, also where an error ends it.
"""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch.distributed as dist

from prfl_engine import checksums, failures, files
from prfl_engine.agree import Agreed, leads, patiently, shared_folder
from prfl_engine.checkpoint_shards import Saving
from prfl_engine.checksums import Sums
from prfl_engine.errors import TrainingError, UserError
from prfl_engine.metrics import note


class Checkpoints:
    """Checkpoint-N of the folder `out`, of which the `keep` newest stay. A with block ends when none is being
    written any more."""

    def __init__(self, out: Path, keep: int, group: dist.ProcessGroup | None = None):
        """group: the ranks that write, None for one process; it serves nothing else where `write` is given
        `shards` that work in the background."""
        self.out, self.keep, self.group = out, keep, group
        self._saving, self._folder = Saving(), ExitStack()

    def write(
        self,
        step: int,
        state: Callable[[Path], None],
        shards: Callable[[Path, Callable[[Sums], None]], Saving] | None = None,
    ) -> None:
        """Write checkpoint-`step`; every rank calls it, and it raises on all if one has failed.

        state(folder) writes at once. shards(folder, then) may go on in the background; it calls `then` when
        all ranks have written, with the checksums of what they wrote. Those of the other files are computed
        there, so no step waits for any where shards are written in the background.
        """
        self.finish()
        with ExitStack() as unless_begun:
            folder = unless_begun.push(ExitStack())
            path = folder.enter_context(shared_folder(self.out / f"checkpoint-{step}", self.group))
            with Agreed(self.group):
                state(path)

            def then(known: Sums) -> None:
                with Agreed(self.group):
                    if leads(self.group):
                        checksums.write(path, known)
                folder.close()  # here it takes its name
                patiently(self._delete_oldest, self.group)

            self._folder = folder
            if shards is None:
                then({})
            else:
                self._saving = shards(path, then)
            unless_begun.pop_all()

    @property
    def failed(self) -> bool:
        """Whether the one on its way is known to have failed: then `finish` and `write` raise."""
        return self._saving.failed

    def finish(self) -> None:
        """Wait for the one on its way; raises on all ranks if one has failed."""
        saving, self._saving = self._saving, Saving()
        folder, self._folder = self._folder, ExitStack()
        with folder:
            saving.wait()

    def last(self) -> str:
        """Which one a run goes on from, in words; one on its way is awaited."""
        self._settle()
        found = files.checkpoints(self.out)
        return f"{found[-1]} is the last good checkpoint" if found else "there is no checkpoint yet"

    def _settle(self) -> None:
        """`finish` where another error already ends the run."""
        try:
            self.finish()
        except (*failures.KINDS, UserError, TrainingError) as error:
            note(f"the checkpoint on its way is lost: {failures.reason(error) or error}")

    def _delete_oldest(self) -> None:
        if leads(self.group):
            for old in files.checkpoints(self.out)[: -self.keep]:
                files.remove_folder(old)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if kind is None:
            self.finish()
        else:
            self._settle()
