"""This project's side of the GRPO benchmark: the task's own steps, with the trainer's update, on one device.

Letters: Q prompts, G completions of each, P tokens of a prompt, N new tokens.
"""

import functools
import time
import warnings
from pathlib import Path

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from attnlab.attention.softmax import SoftmaxConfig
from attnlab.config import Experiment
from attnlab.data.config import DataConfig
from attnlab.experiment import open_task
from attnlab.models.config import ModelConfig
from attnlab.rl.config import GRPOConfig, RLWarning, RolloutConfig
from attnlab.rl.rollout import score_tokens
from attnlab.training.config import TrainingConfig
from attnlab.training.feed import Feed
from attnlab.training.optimizer import OptimizerConfig, make_optimizer
from attnlab.training.schedules import ScheduleConfig, make_schedule
from attnlab.training.sharding import make_mesh, tree_shardings
from attnlab.training.state import init_state, train_step
from attnlab.training.task import Updated
from attnlab.training.throughput import Clock
from benchmarks import grpo_setup as setup

LAYER = {  # below a layer, in Llama's names: (ours, whether it is a matrix, which Llama has transposed)
    "self_attn.q_proj": ("mixer/query/kernel", True),
    "self_attn.k_proj": ("mixer/key/kernel", True),
    "self_attn.v_proj": ("mixer/value/kernel", True),
    "self_attn.o_proj": ("mixer/out/kernel", True),
    "mlp.gate_proj": ("mlp/gate/kernel", True),
    "mlp.up_proj": ("mlp/up/kernel", True),
    "mlp.down_proj": ("mlp/down/kernel", True),
    "input_layernorm": ("mixer_norm/scale", False),
    "post_attention_layernorm": ("mlp_norm/scale", False),
}


def experiment(size: setup.Size, folder: Path, steps: int) -> Experiment:
    """Plain GRPO, one update a rollout, no reference policy; `folder` as `write_files` leaves it."""
    problems, rollout = (
        folder / setup.PROBLEMS,
        RolloutConfig(size.prompt_tokens, size.new_tokens, size.new_tokens),
    )
    b1, b2 = setup.BETAS
    schedule = ScheduleConfig(shape="constant", peak=setup.LEARNING_RATE, warmup_steps=0)
    optimizer = OptimizerConfig(
        b1, b2, setup.ADAM_EPSILON, setup.WEIGHT_DECAY, clip_norm=setup.CLIP_NORM, schedule=schedule
    )
    found = Experiment(
        task="grpo",
        model=ModelConfig(
            layers="softmax",
            num_layers=size.layers,
            hidden_size=size.hidden_size,
            num_heads=size.heads,
            mlp_size=size.inner_size,
            vocab_size=size.vocabulary,
            norm_eps=setup.EPSILON,
            mixers=ModelConfig().mixers | {"softmax": SoftmaxConfig(rope_theta=setup.THETA)},
        ),
        data=DataConfig(batch_size=size.prompts, tokenizer=f"hf:{folder / setup.TOKENIZER}"),
        grpo=GRPOConfig(
            problems=f"jsonl:{problems}?test={problems}",
            rewards=f"{setup.__name__}:{setup.even.__name__}",
            group_size=size.group,
            rollout=rollout,
        ),
        training=TrainingConfig(steps=steps, optimizer=optimizer),
    )
    found.validate(1)
    return found


class Ours:
    """One run, a step at a time."""

    def __init__(self, size: setup.Size, folder: Path, steps: int):
        made = experiment(size, folder, steps)
        config, task, rows = made.training, open_task(made), range(size.prompts)
        optimizer = make_optimizer(config.optimizer)
        init = functools.partial(init_state, task.objective, optimizer, config.seed)
        self.size, self.task, self.number = size, task, 0
        self.mesh = make_mesh(config.mesh, jax.devices()[:1])
        with jax.set_mesh(self.mesh):
            places = tree_shardings(jax.eval_shape(init), self.mesh)
            self.state = jax.jit(init, out_shardings=places)()
        update = functools.partial(
            train_step,
            objective=task.objective,
            optimizer=optimizer,
            schedule=make_schedule(config.optimizer.schedule, steps),
            parts=config.accumulate,
        )
        places = places, NamedSharding(self.mesh, PartitionSpec())
        self.update = jax.jit(update, out_shardings=places, donate_argnums=0)
        self.feed = Feed(task.batches(rows, None), rows, None, self.mesh, size.prompts, Clock())

    @property
    def parameters(self) -> int:
        return sum(leaf.size for leaf in jax.tree.leaves(self.state.params))

    def step(self) -> setup.Seconds:
        """Explore, then update; compiles the first time."""
        began = time.perf_counter()
        with jax.set_mesh(self.mesh), warnings.catch_warnings():
            warnings.simplefilter("ignore", RLWarning)  # every completion is cut off, as it should be here
            done = self._step()
            jax.block_until_ready(self.state)
        seconds = time.perf_counter() - began
        self.number += 1
        if int(done.tokens) != self.size.read:
            raise ArithmeticError(f"a step of attnlab had {int(done.tokens)} tokens, not {self.size.read}")
        return setup.Seconds(done.metrics["time/rollout"], done.metrics["time/update"], seconds)

    def _step(self):
        updates = self.task.updates(self.state.params, {}, self.feed, self.number)
        batch = next(updates)
        try:
            while True:
                self.state, scalars = self.update(self.state, batch)
                batch = updates.send(Updated(scalars, self.state.params))
        except StopIteration as end:
            return end.value

    def log_probs(self, prompts: np.ndarray, completions: np.ndarray) -> np.ndarray:
        """[B, N] of completions [B, N] after prompts [B, P]."""
        given = (prompts, np.zeros(len(prompts), np.int32), completions[:, None])
        with jax.set_mesh(self.mesh):
            score = jax.jit(functools.partial(score_tokens, self.task.objective.module, temperature=1.0))
            logp, _ = score(self.state.params, *given, np.ones(given[-1].shape, bool))
        return np.asarray(logp[:, 0])

    def llama_weights(self) -> dict[str, np.ndarray]:
        """The parameters as a state dict of transformers' Llama, where a linear weight is [out, in]."""
        params = jax.device_get(self.state.params)
        weights = {
            "model.embed_tokens.weight": params["embedding"],
            "model.norm.weight": params["final_norm"]["scale"],
            "lm_head.weight": params["head"].T,
        }
        for name, (path, is_matrix) in LAYER.items():
            stacked = functools.reduce(
                lambda tree, key: tree[key], path.split("/"), params["layers"]["blocks_0"]
            )
            for number, leaf in enumerate(stacked):
                weights[f"model.layers.{number}.{name}.weight"] = leaf.T if is_matrix else leaf
        return weights
