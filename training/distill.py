"""Distillation: a student learns the next-token distribution of a float teacher beside the text.

    loss = (1 - w) · cross entropy + w · KL(teacher ‖ student)          mean over tokens, temperature 1, w = `teacher_weight`

Teacher and student read the same windows. The student may start from the teacher's tensors of equal name and shape: embeddings,
norms and the float masters of its ternary weights.
Source: "Distilling the Knowledge in a Neural Network" (arXiv:1503.02531); for ternary students BitDistill (arXiv:2510.13998),
of which we take the logits alone.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax

from core.errors import InputError
from core.models.export.unfold import other_tensors, projections
from core.models.io.load import load_model
from core.models.loaded import LoadedModel, context_of
from training.corpus import load_tokenizer


def load_teacher(name: str, tokenizer_file: Path, *, seq: int, device: str) -> LoadedModel:
    """Load a teacher by name or folder; environment variables in the name are expanded.

    Args: tokenizer_file: of the student's corpus. seq: tokens of a window.
    Raises: InputError E-PARAM-TEACHER (it has other tokens, or a shorter context); as `load_model`.
    """
    teacher = load_model(os.path.expandvars(name), device=device)
    if teacher.tokenizer.get_vocab() != load_tokenizer(tokenizer_file).get_vocab():
        raise InputError(
            f"The teacher {name[-60:]!r} has other tokens than the texts of this run: name a model trained on the same texts "
            "with the same vocab.",
            code="E-PARAM-TEACHER",
        )
    context = context_of(teacher.model)
    if context is not None and context < seq:
        raise InputError(
            f"The teacher {name[-60:]!r} reads {context:,} tokens at most, a window has {seq:,}: choose a smaller seq.",
            code="E-PARAM-TEACHER",
        )
    return teacher


@torch.no_grad()
def start_from(student: nn.Module, teacher: LoadedModel) -> int:
    """Copy the teacher's tensors of equal name and shape into the student. Returns: how many parameters were copied."""
    known = other_tensors(teacher.model)
    known |= {f"{p.name}.weight": p.weight for p in projections(teacher.model, floats=True)}
    copied = 0
    for name, parameter in student.named_parameters():
        if name in known and known[name].shape == parameter.shape:
            parameter.copy_(known[name])
            copied += parameter.numel()
    return copied


@torch.no_grad()
def teacher_logits(teacher: LoadedModel, rows: Tensor) -> Tensor:
    """Compute the teacher's logits of windows [B, T] int64 for the next tokens: [B, T - 1, V] float32."""
    return teacher.model(input_ids=rows).logits[:, :-1].float()


def divergence(logits: Tensor, teacher: Tensor) -> Tensor:
    """Compute KL(teacher ‖ student) in nats, the mean over tokens, of two tensors of logits [..., V] float32."""
    pairs = (log_softmax(x.flatten(0, -2), dim=-1) for x in (logits, teacher))
    return kl_div(*pairs, reduction="batchmean", log_target=True)
