"""The models of the Forgetting Transformer paper (arXiv 2503.02130) with its training settings.

    python train.py --config=configs/fox.py:fox-pro-360m --config.training.mesh.fsdp=8
    python train.py --config=configs/fox.py:smoke

Presets: {fox,transformer}-{llama,pro}-{125m,360m,760m}; after a comma `smoke` shrinks any of them. Sequences of 16,384
tokens, 32 a batch, warm-up over 512 steps, cosine to 0; the learning rates and lengths are the paper's best.

The paper trains on LongCrawl64 with the GPT-2 vocabulary. Here the text is any TFDS set, and GPT-2's tokeniser file is
yours to give: `--config.data.source=tfds:wiki40b/en --config.data.tokenizer=hf:tokenizer.json` (the defaults are the
standard library's sources as bytes). The paper's perplexities (6.62 for fox-pro-360m at 7.5 billion tokens) hold for
its data only. Not run at these sizes here: only the parameter counts and the smoke form are tested.
"""

from attnlab.config import default_config, to_config_dict, with_variant
from attnlab.models.presets.fox import FOX_BLOCKS, fox_preset

# size: (steps of 524,288 tokens, peak learning rate of each block)
RUNS = {
    "125m": (5120, dict.fromkeys(FOX_BLOCKS, 2e-3)),
    "360m": (14336, dict.fromkeys(FOX_BLOCKS, 2e-3)),
    "760m": (
        92160,
        {"fox-pro": 2e-3, "fox-llama": 1e-3, "transformer-pro": 1e-3, "transformer-llama": 5e-4},
    ),
}


def get_config(variant: str = "fox-pro-125m"):
    preset, _, form = variant.partition(",")
    if preset == "smoke":
        preset, form = "fox-pro-125m", "smoke"
    config = default_config()
    config.model = to_config_dict(fox_preset(preset))
    block, _, size = preset.rpartition("-")
    steps, peaks = RUNS[size]
    config.data.sequence_length = 16_384
    config.data.batch_size = 32
    config.training.steps = steps
    config.training.optimizer.schedule.peak = peaks[block]
    config.training.optimizer.schedule.warmup_steps = 512
    config.training.mesh.data = 1
    config.training.mesh.fsdp = -1
    return with_variant(config, form)
