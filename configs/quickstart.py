"""A small Forgetting Transformer (1.1 million parameters) on the Python standard library's sources, bytes as tokens.

Command:   make train      (python train.py --config=configs/quickstart.py)
Hardware:  two x86 cores with AVX2, no accelerator
Time:      five minutes, the installation of the packages included; about 7,200 tokens/s
Expect:    2.07 bits per byte (standard error 0.07) on all 34 held-out files of Python 3.11.7, 444,448 bytes,
           after 1.6 million training tokens; other Python versions have other files
"""

from attnlab.attention.forgetting import PRO
from attnlab.config import default_config, with_variant


def get_config(variant: str = ""):
    config = default_config()
    config.model.layers = "forgetting"
    config.model.num_layers = 3
    config.model.hidden_size = 160
    config.model.num_heads = 4
    config.model.mlp_size = 448
    config.model.mixers.forgetting.update(PRO)
    config.data.sequence_length = 128
    config.data.batch_size = 8
    config.training.steps = 1600
    config.training.eval_every = 800
    config.training.checkpoint.every = 400
    config.training.optimizer.schedule.peak = 4e-3
    config.training.optimizer.schedule.warmup_steps = 100
    config.eval.batches = 0  # all of the held-out files
    config.eval.batch_size = 32
    return with_variant(config, variant)
