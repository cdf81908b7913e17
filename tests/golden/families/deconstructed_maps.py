"""Operators of Deconstructing Attention (arXiv 2510.11602): Taylor attention, and one map for a whole batch."""

import functools

import jax
import jax.numpy as jnp

from attnlab.attention.sourced import shared_qk_attention
from attnlab.attention.taylor import FORMS, LEAST, read_taylor_state, taylor_attention, taylor_state
from tests.golden.registry import Golden, Unsupported, family

IMPLEMENTATIONS = ("reference", "blockwise")


def cases(golden: Golden) -> list[str]:
    """Names of the cases: files hold in.<case>.q and so on."""
    return sorted({name.split(".")[0] for name in golden.inputs if name.endswith(".q")})


def operands(golden: Golden, case: str) -> tuple:
    return tuple(jnp.asarray(golden.inputs[f"{case}.{name}"]) for name in ("q", "k", "v"))


def with_gradients(golden: Golden, case: str, call) -> dict:
    """out.<case> and grad.<case>.{q,k,v} of call(q, k, v) under the file's cotangent."""
    out, pull = jax.vjp(call, *operands(golden, case))
    values = {f"out.{case}": out}
    if case in golden.cotangents:
        gradients = pull(jnp.asarray(golden.cotangents[case]))
        values |= {f"grad.{case}.{n}": g for n, g in zip("qkv", gradients, strict=True)}
    return values


def is_taylor(golden: Golden) -> bool:
    return "taylor" in str(golden.meta.get("op", "")).lower() and bool(cases(golden))


def form_of(golden: Golden, case: str) -> str:
    """From the settings where they say it, else from the case's name."""
    for place in ("approx_form", "form", "forms"):
        said = golden.meta.get(place)
        said = said.get(case) if isinstance(said, dict) else said
        if isinstance(said, str):
            return said
    found = [form for form in FORMS if form in case]
    if not found:
        raise Unsupported(f"case {case!r} names no form of the polynomial")
    return found[0]


@family("Taylor attention", when=is_taylor, tolerance=1e-10)
def taylor(golden: Golden):
    """Every form, with its decode state where the file has one."""
    guard = golden.meta.get("denominator_guard_eps", LEAST)
    if guard != LEAST:
        raise Unsupported(f"denominators are kept {guard} away from 0, here {LEAST}")

    def run(implementation):
        values = {}
        for case in cases(golden):
            form = form_of(golden, case)
            values |= with_gradients(
                golden,
                case,
                lambda q, k, v, form=form: taylor_attention(
                    q, k, v, form=form, implementation=implementation
                ),
            )
            if form == "full":
                _, k, v = operands(golden, case)
                state = taylor_state(k, v)._asdict()
                values |= {f"out.{case}.state_{name}": value for name, value in state.items()}
        return values

    for implementation in IMPLEMENTATIONS:
        yield implementation, jax.jit(run, static_argnums=0)(implementation)
    yield "recurrent", taylor_recurrent(golden)


def taylor_recurrent(golden: Golden) -> dict:
    """As `taylor`'s blockwise result, but with the last row of "full" read from the state."""
    values = {}
    for case in cases(golden):
        form = form_of(golden, case)
        values |= with_gradients(
            golden, case, lambda q, k, v, form=form: taylor_attention(q, k, v, form=form)
        )
        if form == "full":
            q, k, v = operands(golden, case)
            state = taylor_state(k, v)
            values |= {f"out.{case}.state_{name}": value for name, value in state._asdict().items()}
            values[f"out.{case}"] = values[f"out.{case}"].at[:, -1].set(read_taylor_state(q[:, -1], state))
    return values


def is_shared(golden: Golden) -> bool:
    op = str(golden.meta.get("op", "")).lower()
    return "softmax" in op and ("broadcast" in op or "shared" in op) and bool(cases(golden))


@family("attention with one map a batch", when=is_shared, tolerance=1e-10)
def shared(golden: Golden):
    """Queries and keys of batch 1; their gradients are sums over the batch."""

    def run(implementation):
        values, call = {}, functools.partial(shared_qk_attention, implementation=implementation)
        for case in cases(golden):
            q, k, v = operands(golden, case)
            values |= with_gradients(golden, case, call)
            _, lse = call(q, k, v, return_lse=True)
            values[f"out.{case}.lse"] = lse.swapaxes(1, 2)
        return values

    for implementation in IMPLEMENTATIONS:
        yield implementation, jax.jit(run, static_argnums=0)(implementation)
