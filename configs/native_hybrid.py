"""The models of Native Hybrid Attention (arXiv 2510.07019) with the published training settings.

    python train.py --config=configs/native_hybrid.py:nha-340m --config.training.mesh.fsdp=8
    python train.py --config=configs/native_hybrid.py:nha-hybrid-1.3b --config.model.mixers.native_hybrid.slots=32
    python train.py --config=configs/native_hybrid.py:smoke

Presets: {nha,nha-hybrid,gsa,gsa-hybrid,transformer}-{340m,1.3b}, where a hybrid gives every eighth layer the window of
the whole context and gsa has slots only; nha-llama-3-8b and nha-qwen2.5-7b are pretrained models to be fine-tuned (see
`attnlab.models.llama_to_native_hybrid` for their weights). After a comma `smoke` shrinks any of them.

Batches of 524,288 tokens of length 2048; from scratch a peak rate of 3e-4 over 30,720 steps (16 billion tokens) for
340m, with 1024 steps of warm-up and a cosine to a tenth; 100 billion tokens for 1.3b, whose rate is not known and is
taken to be the same. Converted models: 3e-5 over 10,240 steps. The paper freezes their feed-forward layers, which these
settings do not. It trains on SlimPajama with the Mistral tokeniser; here the text is any TFDS set, with a tokeniser
file of yours (`--config.data.source=... --config.data.tokenizer=hf:...`).

At 1.3b the paper reports Wikitext perplexities of 16.16 (NHA), 16.69 (GSA) and 17.61 (Transformer), and averages over
recall tasks of 46.43, 32.05 and 37.31. Not run at these sizes here: only the parameter counts and the smoke form are
tested.
"""

from attnlab.config import default_config, to_config_dict, with_variant
from attnlab.models.presets.native_hybrid import native_hybrid_preset

# ending of the preset: (steps of 524,288 tokens, peak learning rate)
RUNS = {"340m": (30_720, 3e-4), "1.3b": (190_735, 3e-4), "8b": (10_240, 3e-5), "7b": (10_240, 3e-5)}


def get_config(variant: str = "nha-340m"):
    preset, _, form = variant.partition(",")
    if preset == "smoke":
        preset, form = "nha-340m", "smoke"
    config = default_config()
    config.model = to_config_dict(native_hybrid_preset(preset))
    config.data.sequence_length = 2048
    config.data.batch_size = 256
    steps, peak = RUNS[preset.rpartition("-")[2]]
    config.training.steps = steps
    schedule = config.training.optimizer.schedule
    schedule.shape, schedule.peak, schedule.warmup_steps, schedule.final_fraction = "cosine", peak, 1024, 0.1
    config.training.optimizer.weight_decay = 0.01
    config.training.mesh.data, config.training.mesh.fsdp = 1, -1
    return with_variant(config, form)
