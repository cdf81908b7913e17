"""The models of Deconstructing Attention (arXiv 2510.11602) with its training settings.

    python train.py --config=configs/deconstructed.py:rndemb_qk-500m,even --config.training.mesh.fsdp=8
    python train.py --config=configs/deconstructed.py:nonapprox-160m
    python train.py --config=configs/deconstructed.py:smoke
    python eval.py --workdir=runs/deconstructed --eval=held_out,skipped,per_position

Names: {softmax,mlp,approx,nonapprox,rndemb_qk,fixedseq_qk,staticemb_qk}-{70m,160m,500m,1.7b}, after a comma the layers
that stay softmax (`attnlab/models/layouts.py`; "even" is the paper's hybrid, none of them its uniform model), or
`smoke`, which shrinks any of them. 2048 tokens a sequence and 256 sequences a step for 15 billion tokens (1.7b: 45),
AdamW (0.9, 0.9999), weight decay 0.1, 2000 steps of warm-up, cosine to 0.

The paper trains on SlimPajama with the GPT-NeoX vocabulary; here the text is any source and the tokeniser file is yours
to give. Its numbers for 500m models, WikiText perplexity: softmax 38.1; uniform approx 47.9, staticemb_qk 79.9,
fixedseq_qk 79.1, rndemb_qk 84.8, mlp 993.5, nonapprox diverges; even hybrids 38.5 to 39.4, mlp 45.8. Its limit of
120,000 steps contradicts 15 billion tokens, so the steps here follow the tokens. Not run at these sizes here: only the
parameter counts and the smoke form are tested.
"""

from attnlab.config import default_config, to_config_dict, with_variant
from attnlab.models.presets.deconstructed import LENGTH, deconstructed_preset

TOKENS_PER_STEP = 256 * LENGTH
TOKENS = {"1.7b": 45e9}
PEAK = {"1.7b": 3e-4}


def get_config(variant: str = "rndemb_qk-500m,even"):
    preset, *rest = variant.split(",")
    form = "smoke" if "smoke" in (preset, *rest) else ""
    if preset == "smoke":
        preset, rest = "rndemb_qk-70m", ["even"]
    placement = next((word for word in rest if word != "smoke"), "uniform")
    size = preset.rpartition("-")[2]
    config = default_config()
    config.model = to_config_dict(deconstructed_preset(preset, placement))
    config.model.streams.length = 0  # that of the sequences
    config.data.sequence_length = LENGTH
    config.data.batch_size = 256
    config.training.steps = int(TOKENS.get(size, 15e9) // TOKENS_PER_STEP)
    config.training.optimizer.b2 = 0.9999
    config.training.optimizer.schedule.peak = PEAK.get(size, 4e-4)
    config.training.optimizer.schedule.warmup_steps = 2000
    config.training.mesh.data = 1
    config.training.mesh.fsdp = -1
    return with_variant(config, form)
