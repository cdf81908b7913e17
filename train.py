"""Train an experiment: `python train.py --config=configs/quickstart.py [--workdir=DIR] [--config.FIELD=VALUE ...]`.

Flags in, attnlab out. Run it again to resume; run it on every host of a pod or Slurm job alike.
"""

from pathlib import Path

import jax
from absl import app, flags

from attnlab.cli import check_workdir, config_flag, default_workdir, fail_in_one_sentence, parse_flags
from attnlab.config import from_config_dict
from attnlab.experiment import open_task, prepare
from attnlab.training import multihost
from attnlab.training.loop import train

CONFIG = config_flag("config", "experiment: FILE.py, or FILE.py:smoke for its form of a few seconds")
WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run; default runs/<name of the config file>")
COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "host:port of process 0, for a multi-host job started by hand"
)
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "processes of the multi-host job")
PROCESS_ID = flags.DEFINE_integer("process_id", None, "number of this process, from 0")


def main(_) -> None:
    multihost.initialize(
        coordinator=COORDINATOR.value, num_processes=NUM_PROCESSES.value, process_id=PROCESS_ID.value
    )
    experiment = from_config_dict(CONFIG.value)
    experiment.validate(jax.device_count())
    workdir = check_workdir(Path(WORKDIR.value or default_workdir("config")))
    task = open_task(experiment)
    prepare(task, workdir)
    summary = train(experiment.training, task, workdir)
    if multihost.is_main():
        print(summary.text(workdir))


if __name__ == "__main__":
    with fail_in_one_sentence("train.py"):
        app.run(main, flags_parser=parse_flags)
