"""A small Forgetting Transformer on the Python standard library's own sources, bytes as tokens.

make train        (python train.py --config=configs/quickstart.py)
"""

from attnlab.config import default_config, with_variant


def get_config(variant: str = ""):
    config = default_config()
    config.model.layers = "forgetting"
    config.model.num_layers = 4
    config.model.hidden_size = 192
    config.model.num_heads = 6
    config.model.mlp_size = 512
    config.model.mixers.forgetting.update(
        {
            "qk_norm": True,
            "key_shift": True,
            "value_shift": True,
            "output_norm": True,
            "output_gate": "sigmoid",
        }
    )
    config.data.sequence_length = 256
    config.data.batch_size = 16
    config.training.steps = 600
    config.training.eval_every = 200
    config.training.checkpoint.every = 200
    config.training.optimizer.schedule.peak = 3e-3
    config.training.optimizer.schedule.warmup_steps = 60
    return with_variant(config, variant)
