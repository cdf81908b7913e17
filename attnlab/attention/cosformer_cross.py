"""cosFormer (arXiv 2202.08791) over another sequence, of any width and length, or over a whole sequence both ways.

Letters: B batch, T queries, S keys, H query heads, K key/value heads, D head size, C channels, M re-weighting length.
Query t and key s stand at equal absolute positions; nothing corrects for unequal lengths.
"""

import jax.numpy as jnp

from attnlab.attention.cosformer import (
    ACTIVATIONS,
    CosformerLayer,
    check_length,
    reweighting_angle,
    reweighting_length,
)
from attnlab.attention.cosformer_states import AbsoluteState, absolute_state, read_absolute
from attnlab.attention.heads import split_heads
from kernels.linear import linear_attention
from kernels.masks import Mask
from kernels.signatures import Array


class CrossCosformerAttention(CosformerLayer):
    """Attention of one sequence over another (or itself), causal or not, of any widths; not a language-model layer."""

    causal: bool = False

    def __call__(
        self,
        query: Array,
        key: Array | None = None,
        value: Array | None = None,
        *,
        key_mask: Array | None = None,
    ) -> Array:
        """query [B, T, C]; key [B, S, any width], the query if None; value, the key if None; key_mask bool [B, S]."""
        c = self.config
        key = query if key is None else key
        T, S = query.shape[1], key.shape[1]
        if self.causal and T != S:
            raise ValueError(
                f"causal attention needs equal lengths, got {T} queries and {S} keys; use causal=False"
            )
        fq, fk, v = self._masked(query, key, value, key_mask)
        if c.frequencies != "shared":
            angle = self.angle()
        else:
            M = c.max_length if c.m_mode == "fixed" else None
            length = reweighting_length(c.m_mode, M, T, S, Mask(causal=self.causal), key_mask)
            angle = reweighting_angle(length, c.angle_scale)
        mask = Mask(causal=self.causal)
        num, den = linear_attention(
            fq, fk, v, mask=mask, angle=angle, implementation=c.implementation or None
        )
        return self.readout(fq, num, den)

    def memory(
        self, key: Array, value: Array | None = None, *, key_mask: Array | None = None
    ) -> AbsoluteState:
        """The state of all keys [B, S, any width], built once; `read` gives what queries get from it."""
        self._check_decoding(key.shape[1])
        value = key if value is None else value
        c = self.config
        fk = ACTIVATIONS[c.act](split_heads(self.key(key), c.num_kv_heads))
        v = split_heads(self.value(value), c.num_kv_heads)
        fk, v = _mask_keys(fk, v, key_mask)
        return absolute_state(fk, v, self.angle(), jnp.arange(key.shape[1])[None])

    def read(self, query: Array, state: AbsoluteState, positions: Array) -> Array:
        """query [B, T, C] at positions [B or 1, T] -> [B, T, C]; NaN at positions past max_length."""
        self._check_decoding(query.shape[1])
        c = self.config
        fq = ACTIVATIONS[c.act](split_heads(self.query(query), c.num_heads))
        y = self.readout(fq, *read_absolute(state, fq, self.angle(), positions))
        if c.frequencies != "shared":
            return y
        return jnp.where((positions < c.max_length)[..., None], y, jnp.nan).astype(y.dtype)

    def _masked(self, query, key, value, key_mask):
        fq, fk, v = self.features(query, key, key if value is None else value)
        return fq, *_mask_keys(fk, v, key_mask)

    def _check_decoding(self, length):
        c = self.config
        if c.m_mode != "fixed" or self.causal:
            raise ValueError(
                f"a state needs m_mode='fixed' and causal=False, got m_mode={c.m_mode!r} and causal={self.causal}"
            )
        if c.frequencies == "shared":
            check_length(length, c.max_length)


def _mask_keys(fk, v, key_mask):
    if key_mask is None:
        return fk, v
    return tuple(jnp.where(jnp.asarray(key_mask)[:, :, None, None], x, 0) for x in (fk, v))
