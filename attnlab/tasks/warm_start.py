"""Beginning with the parameters of another run: `init_from` names its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax

from attnlab.config import ConfigError, Experiment


class WarmStart:
    """The part of a task that reads `experiment.init_from`."""

    experiment: Experiment

    def initial_params(self, mesh: jax.sharding.Mesh) -> Any | None:
        """Parameters of the newest intact checkpoint of the run in `init_from`, on `mesh`; None without one.

        ConfigError if that folder holds no run, or one of another model.
        """
        if not self.experiment.init_from:
            return None
        # Opening a run takes a task of its own, and tasks are listed above this file.
        from attnlab.experiment import check_same_model, load_config, open_task, restore_params

        folder = Path(self.experiment.init_from)
        other = open_task(load_config(folder))
        check_same_model(other.experiment, self.experiment, folder)
        restored = restore_params(folder, other, mesh)
        if restored is None:
            raise ConfigError(f"init_from={str(folder)!r} has no checkpoint; train that run first")
        return restored[1]
