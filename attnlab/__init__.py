"""attnlab: the attention mechanisms of eight papers, and one sharded trainer for them, in JAX and Flax."""
