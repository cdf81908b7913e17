"""A tiny model learns countdown or sorting from demonstrations, the start of grpo_countdown.py and grpo_sort.py.

Command:   python train.py --config=configs/sft_problems.py              countdown, one random solution of each problem
           python train.py --config=configs/sft_problems.py:sort         six digits, half of the answers shuffled
           python eval.py --workdir=runs/sft_problems --eval=problems    how many problems it solves
           :smoke, or ,smoke after a variant, for the form of a few seconds
Hardware:  two x86 cores with AVX2, no accelerator; one core is enough
Time:      about 50 CPU-seconds, a third of them compiling
Expect:    countdown: greedy 0.36, mean@8 0.29, pass@8 0.84, entropy 0.57 nats; sort: greedy 0.92, mean@8 0.37. Both on
           512 held-out problems, and both far from finished on purpose: there is something left to explore
"""

from attnlab.config import ConfigError, default_config, with_variant

# problems: (how demonstrations are made, steps, peak learning rate, prompt of the sampled text)
FAMILIES = {
    "countdown": ("problems:countdown", 400, 3e-3, "375:22="),
    "sort": ("problems:sort(noise=0.5)", 300, 1.5e-3, "518203="),
}


def get_config(variant: str = ""):
    family, _, form = variant.partition(",")
    if family in ("", "smoke"):
        family, form = "countdown", family
    if family not in FAMILIES:
        raise ConfigError(
            f"variant {family!r} is unknown; choose one of {', '.join(FAMILIES)}, or smoke after a comma"
        )
    source, steps, peak, prompt = FAMILIES[family]
    config = default_config()
    config.model.layers = "softmax"
    config.model.num_layers = 2
    config.model.hidden_size = 64
    config.model.num_heads = 4
    config.model.mlp_size = 176
    config.data.source = source
    config.data.eval_split = "test"
    config.data.learn_after = "="
    config.data.packing = "truncate"
    config.data.sequence_length = 16
    config.data.batch_size = 128
    config.training.steps = steps
    config.training.eval_every = 0
    config.training.checkpoint.every = steps
    schedule = config.training.optimizer.schedule
    schedule.peak, schedule.warmup_steps, schedule.final_fraction = peak, 50, 0.1
    config.training.optimizer.weight_decay = 0.01
    config.grpo.problems = f"problems:{family}"
    config.grpo.rollout.max_prompt_tokens, config.grpo.rollout.max_new_tokens = 8, 8
    config.eval.batches = 4
    config.eval.problems = 512
    config.eval.sample_prompt, config.eval.sample_tokens, config.eval.samples = prompt, 8, 4
    return with_variant(config, form)
