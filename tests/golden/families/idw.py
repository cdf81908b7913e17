"""Inverse distance weighting (arXiv 2310.18805): the operator, the network and its baselines, editing, training."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from attnlab.attention.inverse_distance import inverse_distance_attention
from attnlab.attention.prototypes import METHODS, idw_network
from attnlab.models.prototypes import Prototypes, augment
from attnlab.training.amsgrad import torch_amsgrad
from kernels import masks
from kernels.masks import Mask
from kernels.streaming import IMPLEMENTATIONS
from tests.golden.registry import Golden, Unsupported, family

NAMES = tuple(each.name for each in IMPLEMENTATIONS if "cpu" in each.platforms)
# The published code's name, and other spellings, of each method.
SYNONYMS = {
    "neglog-dist": "idw",
    "inverse-distance": "idw",
    "scaled-dot": "dot",
    "dot-sqrt-d": "dot-sqrtd",
    "negdist": "neg-dist",
    "gauss": "exp-neg-dist",
    "gaussian": "exp-neg-dist",
    "invdist": "inv-dist",
    "fcrelu": "fc-relu",
    "relu": "fc-relu",
}


def method_of(golden: Golden) -> str:
    name = str(golden.meta.get("method", "idw")).lower().replace("_", "-")
    name = SYNONYMS.get(name, name)
    if name not in METHODS:
        raise Unsupported(f"method {golden.meta['method']!r} does not exist; known: {', '.join(METHODS)}")
    return name


def numbers_of(golden: Golden) -> dict[str, float]:
    """eps and power, by default the published code's."""
    eps, power = golden.meta.get("eps", 1e-3), golden.meta.get("power", golden.meta.get("p", 2))
    if isinstance(power, str):
        raise Unsupported(f"power={power!r} is not a number")
    return {"eps": float(eps), "power": float(power)}


def is_operator(golden: Golden) -> bool:
    return {"in.q", "in.k", "in.v", "out.log_z"} <= golden.arrays.keys() and "eps" in golden.meta


def is_network(golden: Golden) -> bool:
    return {"in.x", "param.keys", "param.values", "out.logits"} <= golden.arrays.keys()


def is_editing(golden: Golden) -> bool:
    return {"param.keys", "param.values", "in.target", "out.eta"} <= golden.arrays.keys()


def is_training(golden: Golden) -> bool:
    return {"param.keys0", "param.values0", "in.batches", "out.lr"} <= golden.arrays.keys()


@family("IDW operator", when=is_operator)
def operator(golden: Golden):
    """Output, log Z and the gradients of sum(out * cot)."""
    q, k, v = (golden.inputs[name] for name in "qkv")
    options = numbers_of(golden) | {"mask": mask_of(golden), "form": form_of(golden)}

    def call(q, k, v, implementation):
        return inverse_distance_attention(
            q, k, v, return_log_z=True, implementation=implementation, **options
        )

    def compute(q, k, v, cotangents, implementation):
        (o, log_z), pull = jax.vjp(partial(call, implementation=implementation), q, k, v)
        of_log_z = cotangents.get("log_z", np.zeros(log_z.shape))
        gradients = pull((cotangents.get("out", np.zeros(o.shape)), of_log_z))
        return {"out.out": o, "out.log_z": log_z} | dict(
            zip(("grad.q", "grad.k", "grad.v"), gradients, strict=True)
        )

    for name in NAMES:
        yield name, jax.jit(compute, static_argnums=4)(q, k, v, golden.cotangents, name)


def form_of(golden: Golden) -> str:
    form = str(golden.meta.get("form", "official")).lower()
    if form not in ("official", "rq"):
        raise Unsupported(f"form {form!r} does not exist; known: official, rq")
    return form


def mask_of(golden: Golden) -> Mask:
    """The mask of the settings, which must be what in.allowed says where that is given."""
    (B, T), S = golden.inputs["q"].shape[:2], golden.inputs["k"].shape[1]
    meta, allowed = golden.meta, golden.inputs.get("allowed")
    mask = Mask(causal=bool(meta.get("causal", False)), window=meta.get("window"))
    lengths = meta.get("lengths", golden.inputs.get("lengths"))
    if lengths is not None:
        mask = dataclasses.replace(mask, lengths=jnp.asarray(lengths, jnp.int32))
    offsets = (int(meta.get("q_offset", 0)), S - T)
    for offset in offsets if mask.causal else offsets[:1]:
        mask = dataclasses.replace(mask, q_offset=offset)
        seen = np.broadcast_to(masks.dense(mask, T, S), (B, T, S))
        if allowed is None or np.array_equal(seen, np.broadcast_to(allowed, (B, T, S))):
            return mask
    raise Unsupported("in.allowed is not the visibility that causal, window and lengths of the settings give")


@family("IDW network", when=is_network)
def network(golden: Golden):
    """Logits, cross-entropy, and the gradients of sum(logits * cot) and of the cross-entropy."""
    given = {"x": golden.inputs["x"]} | {name: golden.params[name] for name in ("keys", "values")}
    labels, cotangent = golden.inputs.get("labels"), golden.cotangents.get("logits")
    options = {"method": method_of(golden)} | numbers_of(golden)

    def compute(given, implementation):
        logits, pull = jax.vjp(
            lambda given: idw_network(**given, implementation=implementation, **options), given
        )
        found, pulled = {"out.logits": logits}, {}
        if cotangent is not None:
            pulled["grad."] = jnp.asarray(cotangent)
        if labels is not None:
            found["out.ce_loss"], pulled["gradce."] = jax.value_and_grad(cross_entropy)(logits, labels)
        (gradients,) = jax.vmap(pull)(jnp.stack(list(pulled.values())))
        for n, prefix in enumerate(pulled):
            found |= {prefix + name: x[n] for name, x in gradients.items()}
        return found

    for name in NAMES:
        yield name, jax.jit(compute, static_argnums=1)(given, name)


def cross_entropy(logits, labels):
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@family("IDW augmentation", when=is_editing)
def editing(golden: Golden):
    """Every input alone: a prototype is appended (to a row, and to a free slot), or prototype 0 is overwritten."""
    numbers = numbers_of(golden)
    prototypes = Prototypes(*(jnp.asarray(golden.params[name]) for name in ("keys", "values")))
    P, inputs = len(prototypes.keys), golden.inputs
    xs, cs = jnp.asarray(inputs["x"]), jnp.asarray(inputs["target"])
    others = jnp.asarray(inputs.get("other_x", xs[:0]))

    @jax.jit
    def logits(prototypes, x):
        return idw_network(x, prototypes.keys, prototypes.values, active=prototypes.active, **numbers)

    def row(x, c):
        """What the file says of one input, with room in a slot; and with prototype 0 overwritten."""
        roomy = Prototypes(
            jnp.pad(prototypes.keys, [(0, 1)] + [(0, 0)] * (x.ndim)),
            jnp.pad(prototypes.values, [(0, 1), (0, 0)]), jnp.arange(P + 1) < P,
        )  # fmt: skip
        new, done = augment(roomy, x, c, **numbers)
        replaced, _ = augment(prototypes, x, c, slot=0, **numbers)
        return {
            "out.added": done.added, "out.eta": done.eta,
            "out.logits_before": logits(prototypes, x[None])[0], "out.logits_after": logits(new, x[None])[0],
            "out.other_logits_after": logits(new, others),
            "out.logits_after_replace0": logits(replaced, x[None])[0],
        }  # fmt: skip

    shared = {"out.other_logits_before": logits(prototypes, others)}
    by_slot = jax.jit(jax.vmap(row))(xs, cs)
    yield "slot", by_slot | shared
    rows = []
    for x, c in zip(xs, cs, strict=True):
        new, done = augment(prototypes, x, int(c), **numbers)
        rows.append((done.added, done.eta, logits(new, x[None])[0], logits(new, others)))
    names = ("out.added", "out.eta", "out.logits_after", "out.other_logits_after")
    appended = {name: np.stack(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}
    yield "append", by_slot | shared | appended


@family("IDW training", when=is_training)
def training(golden: Golden):
    """Adam with AMSGrad, the learning rate a cosine stepped per epoch; parameters after the steps the names tell."""
    meta, inputs, numbers = golden.meta, golden.inputs, numbers_of(golden)
    x, y, batches = jnp.asarray(inputs["x"]), jnp.asarray(inputs["y"]), jnp.asarray(inputs["batches"])
    betas = meta.get("betas", [0.9, 0.999])
    optimizer = torch_amsgrad(float(betas[0]), float(betas[1]), float(meta.get("adam_eps", 1e-8)))
    epoch = jnp.arange(len(batches)) // int(meta.get("steps_per_epoch", len(x) // batches.shape[1]))
    epochs = int(meta.get("T_max_epochs", meta.get("T_max", epoch[-1] + 1)))
    rates = float(meta.get("lr", 0.01)) * (1 + jnp.cos(jnp.pi * epoch / epochs)) / 2

    def loss(params, batch, implementation):
        logits = idw_network(
            x[batch], method=method_of(golden), implementation=implementation, **params, **numbers
        )
        return cross_entropy(logits, y[batch])

    def step(implementation, carry, now):
        params, state = carry
        batch, rate = now
        value, gradients = jax.value_and_grad(loss)(params, batch, implementation)
        direction, state = optimizer.update(gradients, state)
        params = jax.tree.map(lambda p, d: p - rate * d, params, direction)
        return (params, state), (value, params)

    start = {name: jnp.asarray(golden.params[f"{name}0"]) for name in ("keys", "values")}
    for name in NAMES:
        run = jax.jit(lambda start, name=name: jax.lax.scan(
            partial(step, name), (start, optimizer.init(start)), (batches, rates)))  # fmt: skip
        (last, _), (losses, path) = run(start)
        found = {"out.loss": losses, "out.lr": rates} | {f"out.{n}": x for n, x in last.items()}
        for key in golden.results:
            of, _, steps = key.removeprefix("out.").partition("_after_")
            if steps:
                found[key] = path[of][np.array([int(each) - 1 for each in steps.split("_")])]
        yield name, found
