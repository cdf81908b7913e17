"""Reinforcement learning from verifiable rewards: rollout, rewards, advantages, sequence weights, policy losses.

Four orthogonal registries (`advantages`, `sequence_weights`, `policy_losses`, `aggregation`), each a file of pure
functions; `attnlab.objectives.grpo` puts one of each together. Nothing here knows of optimisers or checkpoints.

Letters everywhere: Q prompts, G completions of each (a group), P prompt length, N completion length, V vocabulary,
K reward functions. Groups keep an axis of their own, so that shards, minibatches and micro-batches hold whole ones.
"""
