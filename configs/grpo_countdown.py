"""GRPO, EGSW and their relatives on countdown with a tiny model: accuracy can be had by giving up diversity, or not.

Command:   python train.py --config=configs/sft_problems.py            the policy that all begin from
           python train.py --config=configs/grpo_countdown.py          or :egsw, :egsw_alpha2, :egsw_alpha0, :egsw_step,
           :entropy_bonus, :dapo, :dr_grpo, :gspo, :rloo; :smoke, or ,smoke after a variant, for a few seconds' form
           make reproduce-egsw                                         several seeds of the first ones, compared
Hardware:  two x86 cores with AVX2, no accelerator; one core is enough
Time:      35 to 65 CPU-seconds (0.25 a step, the rest compiling and evaluating)
Expect:    after 100 steps, three seeds, 512 held-out problems (docs/egsw.md): mean@8 0.40, pass@8 0.72 and entropy 0.25
           with GRPO; 0.39, 0.79 and 0.31 with EGSW; from 0.29, 0.84 and 0.57. The variants from :dapo on were trained
           in their smoke form only
"""

from attnlab.config import ConfigError, default_config, with_variant

VARIANTS = {
    "": {},
    "egsw": {"weights": {"name": "egsw"}},
    "egsw_alpha2": {"weights": {"name": "egsw", "alpha": 2.0}},
    "egsw_alpha0": {"weights": {"name": "egsw", "alpha": 0.0}},
    "egsw_step": {"weights": {"name": "egsw", "mode": "step"}},
    "entropy_bonus": {"entropy_bonus": {"coefficient": 0.01}},
    "dapo": {
        "policy_loss": {"eps_high": 0.28},
        "aggregation": "token_mean",
        "dynamic_sampling": True,
        "max_gen_batches": 3,
    },
    "dr_grpo": {"advantage": {"name": "none"}, "aggregation": "seq_sum_const"},
    "gspo": {"policy_loss": {"name": "gspo", "eps_low": 3e-4, "eps_high": 4e-4}, "minibatches": 4},
    "rloo": {"advantage": {"name": "rloo"}, "policy_loss": {"name": "reinforce"}},
}
"""What each variant changes in grpo.*."""


def get_config(variant: str = ""):
    name, _, form = variant.partition(",")
    if name == "smoke":
        name, form = "", "smoke"
    if name not in VARIANTS:
        raise ConfigError(
            f"variant {name!r} is unknown; choose one of {', '.join(VARIANTS)}, or smoke after a comma"
        )
    config = default_config()
    config.task = "grpo"
    config.init_from = "runs/sft_problems"
    config.model.layers = "softmax"
    config.model.num_layers = 2
    config.model.hidden_size = 64
    config.model.num_heads = 4
    config.model.mlp_size = 176
    config.data.batch_size = 32
    config.grpo.problems = "problems:countdown"
    config.grpo.rollout.max_prompt_tokens, config.grpo.rollout.max_new_tokens = 8, 7
    config.grpo.update(VARIANTS[name])
    config.training.steps = 100
    config.training.log_every = 1
    config.training.eval_every = 25
    config.training.checkpoint.every = 50
    optimizer = config.training.optimizer
    optimizer.schedule.shape, optimizer.schedule.peak, optimizer.schedule.warmup_steps = "constant", 3e-4, 0
    optimizer.weight_decay = 0.0
    config.eval.problems = 128
    return with_variant(config, form)
