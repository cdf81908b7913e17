"""What GRPO keeps between steps: reference policy, adaptive entropy coefficient, curriculum; what the options need.

    reference <- mix * policy + (1 - mix) * reference             every kl.sync_steps steps, TR-DPO (arXiv 2404.09656)

All of it is saved with the weights: a resumed run goes on as an unbroken one would.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnlab.data.problems import curriculum
from attnlab.rl.config import GRPOConfig
from attnlab.rl.surrogate import applied_coefficient, next_coefficient

Memory = dict[str, Any]  # reference: parameters; coefficient, last_entropy, level, success: [] float32


def init_memory(options: GRPOConfig, params: Any) -> Memory:
    """Before the first step: the reference is the policy itself. Pure and traceable."""
    memory = {}
    if options.kl.beta:
        memory["reference"] = jax.tree.map(jnp.copy, params)
    if options.entropy_bonus.adaptive:
        memory["coefficient"] = jnp.float32(options.entropy_bonus.coefficient)
        memory["last_entropy"] = jnp.float32(0)  # none was seen: the bonus applies
    if options.curriculum.enabled:
        middle = curriculum.start(options.curriculum.up, options.curriculum.down)
        memory |= {"level": jnp.float32(max(options.curriculum.level, 1)), "success": jnp.float32(middle)}
    return memory


def level_of(options: GRPOConfig, memory: Memory) -> int:
    """The level of the next problems; 0: their own."""
    return int(memory.get("level", options.curriculum.level))


def coefficient_of(options: GRPOConfig, memory: Memory) -> Any:
    """Of the entropy bonus in the next update, a float32 scalar."""
    if not options.entropy_bonus.adaptive:
        return np.float32(options.entropy_bonus.coefficient)
    return applied_coefficient(options.entropy_bonus, memory["coefficient"], memory["last_entropy"])


def after_update(options: GRPOConfig, memory: Memory, entropy: jax.Array) -> Memory:
    """`memory` once an update on a batch of this mean entropy is made."""
    if not options.entropy_bonus.adaptive:
        return memory
    moved = next_coefficient(options.entropy_bonus, memory["coefficient"], entropy)
    return memory | {"coefficient": moved, "last_entropy": entropy}


def after_step(
    options: GRPOConfig, memory: Memory, params: Any, step: int, success: float, num_levels: int
) -> Memory:
    """`memory` at the end of step `step` (0-based), with the updated parameters and the mean of the first reward."""
    if options.kl.sync_steps and (step + 1) % options.kl.sync_steps == 0:
        memory = memory | {"reference": _mix(memory["reference"], params, options.kl.sync_mix)}
    if not options.curriculum.enabled:
        return memory
    c = options.curriculum
    now = (int(memory["level"]), float(memory["success"]))
    moved = curriculum.advance(*now, success, num_levels=num_levels, decay=c.decay, up=c.up, down=c.down)
    places = (memory["level"].sharding, memory["success"].sharding)
    level, mean = (jax.device_put(np.float32(x), place) for x, place in zip(moved, places, strict=True))
    return memory | {"level": level, "success": mean}


@functools.partial(jax.jit, static_argnums=2)
def _mix(reference: Any, params: Any, share: float) -> Any:
    return jax.tree.map(lambda old, new: share * new + (1 - share) * old, reference, params)
