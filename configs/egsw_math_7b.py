"""EGSW on MATH with a decoder of the shape of Qwen2.5-Math-7B: the published experiment, as far as it is known.

    python train.py --config=configs/egsw_math_7b.py --config.init_from=RUN
    python train.py --config=configs/egsw_math_7b.py:grpo          the baseline
    python train.py --config=configs/egsw_math_7b.py:smoke
    python eval.py --workdir=runs/egsw_math_7b --set eval.problems=500

What is known: EGSW (arXiv 2503.22456) compares GRPO with GRPO + EGSW on this family of models. What is inferred: its
public reward curve has points at steps 5, 10, .., 55 and 58, which is what open-r1's public recipe for this model
gives (7500 problems of MATH, 128 a step; logged every 5), so everything here is that recipe with TRL's defaults of the
time: 7 completions a problem, temperature 0.9, rewards for the answer and for the format, a peak rate of 3e-6 after a
tenth of warm-up with a cosine to 0, KL of 0.04 to the start, clipping 0.2, mean over tokens. alpha and P are not
public: 0.5 and 2 are ours. On the public curve training reward goes from 0.66 to 0.70 with GRPO and to 0.76 with EGSW.

Data: `datasets` must be installed; the hub's MATH has columns problem, solution and level, and splits train and test.
RUN is a run with the pretrained weights, which are not converted for this mixer here; the tokeniser's file is yours.
About 7.6 billion parameters in float32 with Adam's moments and a reference policy: 122 GB before activations, so 8
devices of 80 GB or more.

Not run: no such devices were at hand. Only the shape and the smoke form (sums of two digits, on bytes) are tested.
"""

from attnlab.config import default_config, with_variant

TEMPLATE = (
    "{question}\nReason between <think> and </think>, then put the final answer in \\boxed{} between <answer> and "
    "</answer>.\n"
)
END = "<|endoftext|>"


def get_config(variant: str = ""):
    forms = set(filter(None, variant.split(",")))
    config = default_config()
    config.task = "grpo"
    config.model.layers = "softmax"
    config.model.num_layers = 28
    config.model.hidden_size = 3584
    config.model.num_heads = 28
    config.model.num_kv_heads = 4
    config.model.mlp_size = 18_944
    config.model.vocab_size = 152_064
    config.model.dtype = "bfloat16"
    config.model.remat = "parts"
    config.model.mixers.softmax.update({"qkv_bias": True, "rope_theta": 10_000.0})
    config.data.tokenizer = f"hf:tokenizer.json?bos={END}&eos={END}&pad={END}"
    config.data.batch_size = 128
    grpo = config.grpo
    grpo.problems = (
        "hf:DigitalLearningGmbH/MATH-lighteval:train?question=problem&answer=solution&level=level&test=test"
    )
    grpo.template = TEMPLATE
    grpo.rewards = "accuracy + format"
    grpo.group_size = 7
    grpo.aggregation = "token_mean"
    grpo.kl.beta = 0.04
    grpo.weights.name = "none" if "grpo" in forms else "egsw"
    grpo.rollout.update({"max_prompt_tokens": 512, "max_new_tokens": 1024, "temperature": 0.9})
    grpo.rollout.unroll_layers = False  # or the weights would be there twice while sampling
    config.training.steps = 58
    config.training.accumulate = 16
    config.training.log_every = 1
    config.training.eval_every = 29
    config.training.checkpoint.every = 29
    config.training.optimizer.schedule.update({"shape": "cosine", "peak": 3e-6, "warmup_steps": 6})
    config.training.optimizer.update({"b2": 0.999, "weight_decay": 0.0})
    config.training.mesh.data, config.training.mesh.fsdp = 1, -1
    config.eval.problems, config.eval.problem_samples, config.eval.pass_at = 500, 4, (1, 4)
    if "smoke" in forms:
        config.data.tokenizer = "bytes"
        grpo.update({"problems": "problems:add(level=1)", "template": "{question}", "rewards": "exact"})
    return with_variant(config, ",".join(sorted(forms - {"grpo"})))
