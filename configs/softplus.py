"""The models of the softplus attention paper (LSSA and LSSAR, arXiv 2501.13428): does loss stay flat beyond training?

    python train.py --config=configs/softplus.py:lssar-p15-124m --config.training.mesh.fsdp=8
    python train.py --config=configs/softplus.py:lssar-p15-bytes
    python train.py --config=configs/softplus.py:smoke
    python eval.py --workdir=RUN --eval=held_out --set eval.sequence_length=8192

Presets: {softmax,sigmoid,relu,lssa,lssar-p3,lssar-p15,softmax-p15,sigmoid-l1-p15,unit-softmax,ssmax}-{124m,bytes};
after a comma `smoke` shrinks any of them, and `llmc` takes the second recipe below.

124m. The paper trains GPT-2 small on 10 billion tokens of FineWeb at length 1024 on 8 A100: 18,865 steps. It reports
validation losses at 1K / 2K / 4K / 8K of 3.19 / 4.17 / 5.45 / 6.28 for softmax, 3.19 / 4.13 / 5.30 / 5.94 for lssa and
3.19 / 3.19 / 3.23 / 3.32 for lssar-p15. Its optimiser settings are not known: the steps are those of two public
124M recipes of 524,288 tokens a step, and both are here. The default has a peak rate of 1.8e-3, 256 steps of warm-up
and a warm-down over the last 2048 (theirs is linear, ours 1 - sqrt); `llmc` has 6e-4, 700 steps, then a cosine to 0.
Data here is any TFDS set, with a tokeniser file of yours (`--config.data.source=... --config.data.tokenizer=hf:...`).
Not run at this size here: only the parameter counts and the smoke form are tested.

bytes. Three layers of 128 on bytes, trained at length 128 for 1500 steps. The question for it: does lssar-p15 stay
flat to 4 x the training length where softmax does not, and how close does unit-softmax, the control, come? Not run to
its end here, so there is no number to expect.
"""

from attnlab.config import default_config, to_config_dict, with_variant
from attnlab.models.presets.softplus import softplus_preset

STEPS = 18_865
# (shape, peak, warm-up steps, fraction of the steps in which "1-sqrt" falls)
RECIPES = {"nanogpt": ("1-sqrt", 1.8e-3, 256, 2048 / STEPS), "llmc": ("cosine", 6e-4, 700, 0.2)}


def get_config(variant: str = "lssar-p15-124m"):
    preset, *forms = variant.split(",")
    if preset == "smoke":
        preset, forms = "lssar-p15-124m", ["smoke", *forms]
    config = default_config()
    config.model = to_config_dict(softplus_preset(preset))
    schedule = config.training.optimizer.schedule
    if preset.endswith("-bytes"):
        config.data.sequence_length, config.data.batch_size = 128, 16
        config.training.steps = 1500
        schedule.shape, schedule.peak, schedule.warmup_steps, schedule.final_fraction = (
            "cosine",
            2e-3,
            100,
            0.1,
        )
    else:
        recipe = RECIPES["llmc" if "llmc" in forms else "nanogpt"]
        config.data.sequence_length, config.data.batch_size = 1024, 512
        config.training.steps = STEPS
        schedule.shape, schedule.peak, schedule.warmup_steps, schedule.decay_fraction = recipe
        config.training.mesh.data, config.training.mesh.fsdp = 1, -1
        forms = [form for form in forms if form != "llmc"]
    return with_variant(config, ",".join(forms))
