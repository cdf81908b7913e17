"""A tiny language model and documents in memory, for the tests of all evaluators."""

import dataclasses
import functools

import jax
import numpy as np

from attnlab.config import Experiment
from attnlab.data.config import DataConfig
from attnlab.data.tokenizers import open_tokenizer
from attnlab.evaluation import Context, EvalConfig
from attnlab.models.config import ModelConfig
from attnlab.objectives.language_modelling import LanguageModelling, LanguageModellingConfig, token_losses
from attnlab.training.sharding import MeshConfig, make_mesh

TOKENIZER = open_tokenizer("bytes")


def documents(lengths, seed=0) -> list[bytes]:
    """Random lower-case text of these lengths in bytes."""
    rng = np.random.default_rng(seed)
    return [rng.integers(97, 123, length, dtype=np.uint8).tobytes() for length in lengths]


@functools.cache
def model_config() -> ModelConfig:
    """Half of its vocabulary is beyond the tokeniser's, as padding of V may be."""
    layers = "forgetting(implementation='reference')"
    sizes = {
        "num_layers": 1,
        "hidden_size": 32,
        "num_heads": 2,
        "mlp_size": 24,
        "vocab_size": 528,
    }  # half of V is no token
    return ModelConfig(layers, **sizes, init_std=0.2, scan_layers=False)


def objective(sequence_length: int = 16) -> LanguageModelling:
    return LanguageModelling(model_config(), LanguageModellingConfig(z_loss=0.5), sequence_length)


@functools.cache
def params():
    return jax.jit(objective().init)(jax.random.key(0))


def context(texts, *, batch_size=3, sequence_length=16, mesh=None, **evaluation) -> Context:
    """What `open_task` would make, reading `texts` instead of a prepared source."""
    data = DataConfig(sequence_length=sequence_length, batch_size=batch_size)
    experiment = Experiment(model=model_config(), data=data, eval=EvalConfig(**{"batches": 0, **evaluation}))
    mesh = mesh or make_mesh(MeshConfig(), jax.devices()[:1])
    return Context(experiment, objective(), params(), mesh, TOKENIZER, step=7, source=texts)


def document_losses(texts, length: int) -> list[np.ndarray]:
    """The loss of every target of each document (those after `length` left out), float64, one document at a time."""
    run = jax.jit(lambda p, tokens: objective().module.apply({"params": p}, tokens))
    losses = []
    for text in texts:
        tokens = np.array([TOKENIZER.bos_id, *text, TOKENIZER.eos_id], np.int32)[: length + 1]
        padded = np.pad(tokens, (0, length + 1 - len(tokens)))
        nll, _ = token_losses(run(params(), padded[None, :-1]), padded[None, 1:])
        losses.append(np.asarray(nll[0, : len(tokens) - 1], np.float64))
    return losses


def with_eval(of: Context, **changes) -> Context:
    """The same context with other options of evaluation."""
    experiment = of.experiment
    changed = dataclasses.replace(experiment, eval=dataclasses.replace(experiment.eval, **changes))
    return dataclasses.replace(of, experiment=changed)
