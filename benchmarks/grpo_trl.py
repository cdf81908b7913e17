"""Hugging Face TRL's side of the GRPO benchmark. Import it only where torch, transformers, trl and datasets are.

TRL runs its own training loop; the other side takes its turns between two steps of it. Completions come from
transformers' `generate`, which is what TRL uses unless it is given a server such as vLLM; precision is float32 and
nothing is recomputed in the backward pass, as on the other side.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

os.environ["HF_HUB_OFFLINE"] = "1"  # before they are imported: nothing here is to be downloaded

import datasets
import torch
import transformers
import trl

from benchmarks import grpo_setup as setup


def make_model(size: setup.Size, weights: dict[str, np.ndarray]) -> torch.nn.Module:
    """A Llama of this size with exactly these weights, by name."""
    config = transformers.LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden_size,
        intermediate_size=size.inner_size,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        max_position_embeddings=size.prompt_tokens + size.new_tokens,
        rms_norm_eps=setup.EPSILON,
        rope_parameters={"rope_type": "default", "rope_theta": setup.THETA},
        tie_word_embeddings=False,
        **{f"{role}_token_id": setup.SPECIAL.index(piece) for role, piece in _special().items()},
    )
    model = transformers.LlamaForCausalLM(config).float()
    model.load_state_dict({name: torch.tensor(np.array(value)) for name, value in weights.items()})
    return model


def count(model: torch.nn.Module) -> int:
    """Numbers in the parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


@torch.no_grad()
def log_probs(model: torch.nn.Module, prompts: np.ndarray, completions: np.ndarray) -> np.ndarray:
    """[B, N] of completions [B, N] after prompts [B, P]."""
    tokens = torch.tensor(np.concatenate([prompts, completions], axis=1), dtype=torch.long)
    logits = model(tokens.to(model.device)).logits[:, prompts.shape[1] - 1 : -1].float().cpu()
    labels = torch.tensor(completions, dtype=torch.long)[..., None]
    return logits.log_softmax(-1).gather(-1, labels)[..., 0].numpy()


def run(
    model: torch.nn.Module,
    size: setup.Size,
    folder: Path,
    texts: list[str],
    steps: int,
    other: Callable[[], None],
) -> list[setup.Seconds]:
    """Seconds of each of `steps` steps, after each of which `other` takes its turn."""
    timer = _Timer(size, other)
    trainer = _Trainer(
        timer=timer,
        model=model,
        reward_funcs=_even,
        args=_arguments(size, folder, steps),
        train_dataset=datasets.Dataset.from_list([{"prompt": text} for text in texts]),
        processing_class=transformers.PreTrainedTokenizerFast(
            tokenizer_file=str(folder / setup.TOKENIZER),
            padding_side="left",
            **{f"{role}_token": piece for role, piece in _special().items()},
        ),
        callbacks=[timer],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    return timer.steps


def _special() -> dict[str, str]:
    return {"pad": setup.PAD, "bos": setup.BOS, "eos": setup.EOS}


def _even(completion_ids, **_):
    return setup.even(completion_ids)


def _arguments(size, folder, steps):
    """Plain GRPO, one update a rollout, no reference policy, with the other side's optimiser."""
    b1, b2 = setup.BETAS
    return trl.GRPOConfig(
        output_dir=str(folder / "trl"),
        max_steps=steps,
        per_device_train_batch_size=size.prompts * size.group,
        gradient_accumulation_steps=1,
        num_generations=size.group,
        num_iterations=1,
        max_completion_length=size.new_tokens,
        generation_kwargs={"min_new_tokens": size.new_tokens},
        temperature=1.0,
        beta=0.0,
        loss_type="grpo",
        shuffle_dataset=False,
        learning_rate=setup.LEARNING_RATE,
        lr_scheduler_type="constant",
        weight_decay=setup.WEIGHT_DECAY,
        adam_beta1=b1,
        adam_beta2=b2,
        adam_epsilon=setup.ADAM_EPSILON,
        max_grad_norm=setup.CLIP_NORM,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=not torch.cuda.is_available(),
        report_to="none",
        logging_strategy="no",
        save_strategy="no",
        disable_tqdm=True,
    )


class _Timer(transformers.TrainerCallback):
    """Notes when a step begins and ends, and gives the other side its turn outside of it."""

    def __init__(self, size: setup.Size, other: Callable[[], None]):
        self.size, self.other, self.steps, self.tokens = size, other, [], 0
        self.began = self.rollout = self.prepared = 0.0

    def on_step_begin(self, args, state, control, **kwargs):
        self.began, self.rollout, self.prepared = time.perf_counter(), 0.0, 0.0

    def on_step_end(self, args, state, control, **kwargs):
        _wait()
        step = time.perf_counter() - self.began
        if not 0 < self.rollout < self.prepared < step:
            raise RuntimeError(
                f"TRL {trl.__version__} has no rollout where version 1.16 has it; measure that one"
            )
        self.steps.append(setup.Seconds(self.rollout, step - self.prepared, step))
        tokens, self.tokens = state.num_input_tokens_seen - self.tokens, state.num_input_tokens_seen
        if tokens != self.size.read:
            raise ArithmeticError(f"a step of TRL had {tokens} tokens, not {self.size.read}")
        self.other()


class _Trainer(trl.GRPOTrainer):
    """With a stopwatch around the rollout, and around all that comes before the update."""

    def __init__(self, *, timer: _Timer, **options):
        self.timer = timer
        super().__init__(**options)

    def _generate_single_turn(self, *args, **kwargs):
        began = time.perf_counter()
        found = super()._generate_single_turn(*args, **kwargs)
        self.timer.rollout = time.perf_counter() - began
        return found

    def _prepare_inputs(self, *args, **kwargs):
        began = time.perf_counter()
        found = super()._prepare_inputs(*args, **kwargs)
        _wait()
        self.timer.prepared = time.perf_counter() - began
        return found


def _wait():
    if torch.cuda.is_available():
        torch.cuda.synchronize()
