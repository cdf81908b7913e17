"""The language models around cosFormer (arXiv 2202.08791): does the cosine help linear attention, and against softmax?

    python train.py --config=configs/cosformer.py:cosformer-base --config.training.mesh.fsdp=8
    python train.py --config=configs/cosformer.py:cosformer-bytes
    python train.py --config=configs/cosformer.py:smoke

Presets: {cosformer,relu,elu1,elu1-cosine,cosformer-norm,softmax}-{base,base-h1-l7,12-layers,large,bytes}; after a comma
`smoke` shrinks any of them.

base. The authors' own later comparison on WikiText-103: 44.65 million parameters, length 512, 65,536 tokens a step,
100,000 steps, Adam (0.9, 0.98) with weight decay 0.01, peak 5e-4 after 8000 steps of warm-up. Test perplexities there:
softmax 24.78, cosformer 27.06, elu1 28.05, cosformer-norm's relative TransNormer 25.00. The paper itself prints 23.1
for a larger cosFormer and 26.2 for a softmax model taken from another paper; the matched run does not bear that out.
Here the rate falls as a cosine (theirs as an inverse root), there is no dropout and no position embedding, and the
text is any TFDS set with a tokeniser file of yours (`--config.data.source=... --config.data.tokenizer=hf:...`).
Not run at this size here: only the parameter counts and the smoke form are tested.

bytes. Two layers of 64 on bytes at length 128, 400 steps. The questions for it: what does the cosine give the
same features (compare equal seeds), and has relu without it spikes in its gradient? Not run to its end here, so there
is no number to expect.
"""

from attnlab.config import default_config, to_config_dict, with_variant
from attnlab.models.presets.cosformer import cosformer_preset


def get_config(variant: str = "cosformer-base"):
    preset, _, form = variant.partition(",")
    if preset == "smoke":
        preset, form = "cosformer-base", "smoke"
    config = default_config()
    config.model = to_config_dict(cosformer_preset(preset))
    optimizer, schedule = config.training.optimizer, config.training.optimizer.schedule
    optimizer.b2, optimizer.weight_decay = 0.98, 0.01
    if preset.endswith("-bytes"):
        config.data.sequence_length, config.data.batch_size = 128, 8
        config.training.steps = 400
        schedule.peak, schedule.warmup_steps, schedule.final_fraction = 3e-3, 50, 0.1
    else:
        config.data.sequence_length, config.data.batch_size = 512, 128
        config.training.steps = 100_000
        schedule.peak, schedule.warmup_steps = 5e-4, 8000
        optimizer.clip_norm = 0.0
        config.training.mesh.data, config.training.mesh.fsdp = 1, -1
    return with_variant(config, form)
