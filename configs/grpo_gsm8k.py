"""GRPO on grade-school word problems (GSM8K, arXiv 2110.14168) with a decoder of 0.5 billion parameters.

    python train.py --config=configs/grpo_gsm8k.py --config.init_from=RUN --config.data.tokenizer=hf:tokenizer.json
    python train.py --config=configs/grpo_gsm8k.py:egsw
    python train.py --config=configs/grpo_gsm8k.py:smoke
    python eval.py --workdir=runs/grpo_gsm8k --set eval.problems=1319

The problems are TFDS's `gsm8k` (7473 to train on, 1319 to test), downloaded on first use. RUN is a run of this model
that can already follow the template now and then (pretrained, then `task="language_modelling"` on solutions): a policy
that never solves a problem has no reward to learn from. The shape is that of Qwen2.5-0.5B; its weights are not
converted here. One rollout is 64 problems x 8 completions of at most 512 tokens, 350 rollouts are three epochs; the
learning rate and the clipping are those of the large published runs (1e-6, 0.2), without a KL term.

Not run at this size: neither the data nor such a model was at hand. Only the shape and the smoke form (sums of two
digits, on bytes) are tested, so there is no number to expect.
"""

from attnlab.config import default_config, with_variant

TEMPLATE = (
    "Question: {question}\nReason step by step between <think> and </think>, then give the number alone between "
    "<answer> and </answer>.\nAnswer: "
)


def get_config(variant: str = ""):
    forms = set(filter(None, variant.split(",")))
    config = default_config()
    config.task = "grpo"
    config.model.layers = "softmax"
    config.model.num_layers = 24
    config.model.hidden_size = 896
    config.model.num_heads = 14
    config.model.num_kv_heads = 2
    config.model.mlp_size = 4864
    config.model.vocab_size = 151_936
    config.model.tie_embeddings = True
    config.model.dtype = "bfloat16"
    config.model.remat = "parts"
    config.model.mixers.softmax.update({"qkv_bias": True, "rope_theta": 1_000_000.0})
    config.data.tokenizer = "hf:tokenizer.json"
    config.data.batch_size = 64
    config.grpo.problems = "tfds:gsm8k"
    config.grpo.template = TEMPLATE
    config.grpo.rewards = "accuracy + 0.2*format"
    config.grpo.rollout.max_prompt_tokens, config.grpo.rollout.max_new_tokens = 256, 512
    if "egsw" in forms:
        config.grpo.weights.name = "egsw"
    config.training.steps = 350
    config.training.accumulate = 8
    config.training.log_every = 1
    config.training.eval_every = 50
    config.training.checkpoint.every = 50
    config.training.optimizer.schedule.update({"shape": "constant", "peak": 1e-6, "warmup_steps": 10})
    config.training.optimizer.weight_decay = 0.0
    config.training.mesh.data, config.training.mesh.fsdp = 1, -1
    config.eval.problems, config.eval.problem_samples, config.eval.pass_at = 256, 4, (1, 4)
    if "smoke" in forms:
        config.data.tokenizer = "bytes"
        config.grpo.update(
            {"problems": "problems:add(level=1)", "template": "{question}", "rewards": "exact"}
        )
    return with_variant(config, ",".join(sorted(forms - {"egsw"})))
