"""Byte language models with inverse distance weighting attention (arXiv 2310.18805) beside softmax.

    python train.py --config=configs/inverse_distance.py:idw-tiny
    python train.py --config=configs/inverse_distance.py:softmax-tiny
    python train.py --config=configs/inverse_distance.py:smoke

Presets: {idw,idw-p2,softmax}-{tiny,small}; after a comma `smoke` shrinks any of them. `idw` learns its power from
sqrt(2 D); `idw-p2` has the paper's power 2, whose weights are nearly uniform at these head sizes.

The paper trains no language model, so it gives no number to expect. Only the smoke form is tested here; what to watch
is that the loss of `idw` falls beside that of `softmax` and stays finite. The paper's own experiment is the prototype
network of `attnlab/models/prototypes.py`.
"""

from attnlab.config import default_config, to_config_dict, with_variant
from attnlab.models.presets.inverse_distance import inverse_distance_preset

PEAKS = {"tiny": 4e-3, "small": 2e-3}


def get_config(variant: str = "idw-tiny"):
    preset, _, form = variant.partition(",")
    if preset == "smoke":
        preset, form = "idw-tiny", "smoke"
    config = default_config()
    config.model = to_config_dict(inverse_distance_preset(preset))
    config.data.sequence_length = 128
    config.data.batch_size = 16
    config.training.steps = 1500
    config.training.optimizer.schedule.peak = PEAKS[preset.rpartition("-")[2]]
    config.training.optimizer.schedule.warmup_steps = 100
    return with_variant(config, form)
