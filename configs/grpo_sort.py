"""GRPO teaches a tiny model to sort six digits: the check that the whole of the RL trainer learns, in 60 rollouts.

Command:   python train.py --config=configs/sft_problems.py:sort
           python train.py --config=configs/grpo_sort.py       (--config.grpo.weights.name=egsw: with EGSW)
           :smoke for the form of a few seconds, which needs no other run
Hardware:  two x86 cores with AVX2, no accelerator; one core is enough
Time:      about 50 CPU-seconds for each of the two
Expect:    mean@8 on 128 held-out problems rises from 0.37 to 0.83 (0.89 with EGSW; one seed); entropy falls throughout.
           One answer is right and found early, so there is little to explore: grpo_countdown.py tells methods apart
"""

from attnlab.config import default_config, with_variant


def get_config(variant: str = ""):
    config = default_config()
    config.task = "grpo"
    config.init_from = "runs/sft_problems-sort"
    config.model.layers = "softmax"
    config.model.num_layers = 2
    config.model.hidden_size = 64
    config.model.num_heads = 4
    config.model.mlp_size = 176
    config.data.batch_size = 32
    config.grpo.problems = "problems:sort"
    config.grpo.rollout.max_prompt_tokens, config.grpo.rollout.max_new_tokens = 8, 8
    config.training.steps = 60
    config.training.log_every = 1
    config.training.eval_every = 20
    config.training.checkpoint.every = 60
    optimizer = config.training.optimizer
    optimizer.schedule.shape, optimizer.schedule.peak, optimizer.schedule.warmup_steps = "constant", 3e-4, 0
    optimizer.weight_decay = 0.0
    return with_variant(config, variant)
