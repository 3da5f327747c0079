"""The configuration of a training run: a frozen dataclass, its JSON or TOML file, model and schedule."""

from __future__ import annotations

import difflib
import json
import tomllib
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from core.checks import param_code, require_choice, require_float, require_int, require_text
from core.errors import InputError
from core.quant.dynamic import MODES
from training.bitlinear import convert_to_bitlinear, input_kinds
from training.schedule import Schedule

ARCHITECTURES = {"bitnet": "relu2", "llama": "silu", "opt": "relu"}
"""Architectures and their usual activation: transformers' BitNet (gated, sub-norms), Llama, OPT (LayerNorm, biases)."""

ACTIVATIONS = ("silu", "relu2", "relu", "gelu")
PRECISIONS = ("bf16", "fp32")
COMPILE = ("auto", "no")
MAX_CONFIG_BYTES = 2**20


@dataclass(frozen=True)
class TrainConfig:
    """One training run.

    Attributes:
        name: of the run and of what it exports.
        architecture, activation, hidden, layers, heads, kv_heads, ffn, vocab, seq: the model; seq is also its context.
        mode, inputs, keep: quantisers (`bitlinear.set_mode`); "fp" for llama and opt.
        switch, switch_mode, restart_lr: stage 2 begins after this share of the steps with these quantisers.
        tokens, batch: tokens in all, sequences per step. steps = tokens // (batch · seq).
        lr, end_lr, warmup, weight_decay, clip: `Schedule`; betas are (0.9, 0.95); clip is the largest gradient norm.
        texts: (name or file, repeats), see `corpus`.
        seed: of the initial weights and of the order of windows.
        precision: bf16 computes in bfloat16 (masters stay float32). compile: auto compiles where a compiler is found.
        init_from: a checkpoint folder to take weights from; with `resume_optimizer` also optimizer states and step.
        teacher: a float model by name or folder that the run learns from beside the text; teacher_weight: its share of the loss;
            teacher_start: begin with its tensors of equal name and shape. See `distill`.
        checkpoint_every, eval_every: steps. keep_at: shares of the steps whose checkpoint is kept.
    """

    name: str
    architecture: str
    hidden: int = 256
    layers: int = 6
    heads: int = 4
    kv_heads: int | None = None
    ffn: int = 768
    vocab: int = 4096
    seq: int = 256
    activation: str | None = None
    mode: str = "fp"
    inputs: dict[str, str] = field(default_factory=dict)
    keep: float = 0.5
    switch: float | None = None
    switch_mode: str = "a4.8"
    restart_lr: float | None = None
    tokens: int = 1_000_000
    batch: int = 16
    lr: tuple[float, float] = (1.5e-3, 1e-3)
    end_lr: float = 3e-5
    warmup: int = 100
    weight_decay: tuple[float, float] = (0.1, 0.0)
    clip: float | None = None
    texts: tuple[tuple[str, int], ...] = (("sotu", 1),)
    seed: int = 0
    precision: str = "bf16"
    compile: str = "auto"
    init_from: str | None = None
    resume_optimizer: bool = False
    teacher: str | None = None
    teacher_weight: float = 0.5
    teacher_start: bool = False
    checkpoint_every: int = 100
    eval_every: int = 100
    keep_at: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        require_text("name", self.name, "The run has no name: give it one, such as quantscope-llama-6m.")
        require_choice("architecture", self.architecture, tuple(ARCHITECTURES))
        if self.activation is None:
            object.__setattr__(self, "activation", ARCHITECTURES[self.architecture])
        if self.kv_heads is None:
            object.__setattr__(self, "kv_heads", self.heads)
        for name, value, choices in (
            ("activation", self.activation, ACTIVATIONS),
            ("compile", self.compile, COMPILE),
            ("precision", self.precision, PRECISIONS),
        ):
            require_choice(name, value, choices)
        for name, low, high in _SIZES:  # 32.0 becomes 32
            size = require_int(name, getattr(self, name), low, high, f"use a whole number from {low:,} to {high:,}")
            object.__setattr__(self, name, size)
        for name, low, high in _RATES:
            object.__setattr__(self, name, _rates(name, getattr(self, name), low, high))
        for name in ("lr", "weight_decay"):
            if len(getattr(self, name)) != 2:
                raise InputError(f"{name} needs two numbers: before and after half of the steps.", code=param_code(name))
        object.__setattr__(self, "texts", _texts(self.texts))
        if not isinstance(self.inputs, dict):
            raise InputError(
                f'inputs is {str(self.inputs)[:40]!r}: name quantisers by input, such as {{"down_in": "int8"}}.',
                code="E-PARAM-INPUTS",
            )
        for name, what in (("init_from", "a checkpoint folder"), ("teacher", "a model")):
            value = getattr(self, name)
            if value is not None:
                require_text(name, value, f"{name} is {str(value)[:40]!r}: name {what}, or leave it out.")
        for name in ("resume_optimizer", "teacher_start"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise InputError(f"{name} is {str(value)[:40]!r}: use true or false.", code=param_code(name))
        self._check_shape()

    def _check_shape(self) -> None:
        """Check fields that depend on each other."""
        input_kinds(self.mode, self.inputs)
        require_choice("switch mode", self.switch_mode, tuple(MODES))
        if self.hidden % (2 * self.heads) or self.heads % self.kv_heads:
            raise InputError(
                f"hidden {self.hidden}, heads {self.heads} and kv_heads {self.kv_heads} do not divide evenly: each "
                "head needs an even width.",
                code="E-PARAM-HEADS",
            )
        if self.architecture == "opt" and self.kv_heads != self.heads:
            raise InputError("OPT has no shared key/value heads: leave kv_heads out.", code="E-PARAM-KV_HEADS")
        if self.architecture != "bitnet" and (self.mode != "fp" or self.switch is not None):
            raise InputError(
                f"Mode {self.mode[:20]!r} with architecture {self.architecture}: only bitnet trains quantised; "
                "use mode fp without a switch.",
                code="E-PARAM-MODE",
            )
        ternary = {self.mode, self.mode if self.switch is None else self.switch_mode} != {"fp"}
        for name, rows in (("hidden", self.hidden), ("ffn", self.ffn), ("kv_heads", self.hidden // self.heads * self.kv_heads)):
            if ternary and rows % 4:
                raise InputError(
                    f"{name} gives ternary projections of {rows} rows, and four are stored in a byte: choose a size that makes "
                    "it a multiple of 4.",
                    code=param_code(name),
                )
        if self.steps <= self.warmup:
            raise InputError(
                f"tokens {self.tokens:,} make {self.steps} steps of {self.batch} × {self.seq}, the warm-up is "
                f"{self.warmup}: give more tokens or a shorter warm-up.",
                code="E-PARAM-TOKENS",
            )
        if self.resume_optimizer and self.init_from is None:
            raise InputError("resume_optimizer needs init_from: name a checkpoint folder.", code="E-PARAM-INIT_FROM")
        if self.teacher_start and (self.teacher is None or self.init_from is not None):
            rule = "teacher_start needs a teacher and no init_from: the run begins with one of them."
            raise InputError(rule, code="E-PARAM-TEACHER")

    @property
    def steps(self) -> int:
        """Number of optimizer steps: tokens // (batch · seq)."""
        return self.tokens // (self.batch * self.seq)

    @property
    def schedule(self) -> Schedule:
        """Learning rate, weight decay and stage of each step."""
        return Schedule(self.steps, self.warmup, self.lr, self.end_lr, self.weight_decay, self.switch, self.restart_lr)

    def mode_at(self, step: int) -> str:
        """Return the quantisation mode of a step."""
        return self.switch_mode if self.schedule.stage(step) == 2 else self.mode

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types that `from_dict` accepts."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_dict(cls, data: object) -> TrainConfig:
        """Make a run from plain data. Raises: InputError for unknown or missing fields and bad values."""
        if not isinstance(data, dict):
            raise InputError("The training configuration is not an object: see configs/train.", code="E-PARAM-CONFIG")
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(data) - known):
            close = difflib.get_close_matches(unknown[0], known, n=1)
            hint = f" Did you mean {close[0]}?" if close else " See configs/train."
            raise InputError(f"The training configuration has an unknown field {unknown[0][:40]!r}.{hint}", code="E-PARAM-CONFIG")
        if missing := sorted({"name", "architecture"} - set(data)):
            raise InputError(f"The training configuration lacks {missing[0]!r}.", code="E-PARAM-CONFIG")
        return cls(**data)

    @classmethod
    def read(cls, path: str | Path) -> TrainConfig:
        """Read a run from a `.json` or `.toml` file. Raises: InputError E-PARAM-CONFIG."""
        path = Path(path)
        try:
            if path.stat().st_size > MAX_CONFIG_BYTES:
                raise InputError(f"{path.name[-60:]!r} is larger than 1 MB: is it a configuration?", code="E-PARAM-CONFIG")
            text = path.read_text(encoding="utf-8")
            data = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
        except OSError as error:
            raise InputError(
                f"The training configuration {path.name[-60:]!r} cannot be read: {error.strerror}.", code="E-PARAM-CONFIG"
            ) from error
        except (ValueError, RecursionError) as error:
            raise InputError(
                f"The training configuration {path.name[-60:]!r} is not valid {path.suffix[1:10] or 'JSON'}: see "
                "configs/train for examples.",
                code="E-PARAM-CONFIG",
            ) from error
        return cls.from_dict(data)

    def build_model(self) -> PreTrainedModel:
        """Build the model with seeded random weights (standard deviation 0.02), float32, BitLinear where the mode asks for it."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            model = AutoModelForCausalLM.from_config(
                AutoConfig.for_model(self.architecture, **self._model_fields()), dtype=torch.float32, attn_implementation="sdpa"
            )
        if self.architecture == "bitnet":
            convert_to_bitlinear(model, self.mode, inputs=self.inputs, keep=self.keep)
        return model

    def _model_fields(self) -> dict[str, Any]:
        """Return the fields of the transformers configuration. Token 0 is the end mark, also used as first token and padding."""
        shared = {
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "vocab_size": self.vocab,
            "max_position_embeddings": self.seq,
            "tie_word_embeddings": True,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "pad_token_id": None,
        }
        if self.architecture == "opt":
            return shared | {
                "ffn_dim": self.ffn,
                "word_embed_proj_dim": self.hidden,
                "activation_function": self.activation,
                "dropout": 0.0,
                "attention_dropout": 0.0,
                "layerdrop": 0.0,
                "do_layer_norm_before": True,
            }
        rope = {"rope_type": "default", "rope_theta": 10_000.0}
        return shared | {
            "intermediate_size": self.ffn,
            "num_key_value_heads": self.kv_heads,
            "hidden_act": self.activation,
            "rms_norm_eps": 1e-5,
            "rope_parameters": rope,
        }


_SIZES = (
    ("hidden", 8, 16_384),
    ("layers", 1, 128),
    ("heads", 1, 256),
    ("kv_heads", 1, 256),
    ("ffn", 8, 65_536),
    ("vocab", 257, 65_536),
    ("seq", 8, 8_192),
    ("tokens", 1, 10**13),
    ("batch", 1, 65_536),
    ("warmup", 1, 10**6),
    ("seed", 0, 2**31 - 1),
    ("checkpoint_every", 1, 10**9),
    ("eval_every", 1, 10**9),
)
_RATES = (
    ("lr", 1e-8, 1.0),
    ("end_lr", 0.0, 1.0),
    ("weight_decay", 0.0, 1.0),
    ("clip", 1e-6, 1e6),
    ("keep", 1e-3, 1.0),
    ("switch", 0.0, 1.0),
    ("restart_lr", 0.0, 1.0),
    ("teacher_weight", 0.0, 1.0),
    ("keep_at", 0.0, 1.0),
)
_LISTS = ("lr", "weight_decay", "keep_at")
_OPTIONAL = ("clip", "switch", "restart_lr")


def _rates(name: str, value: object, low: float, high: float) -> float | tuple[float, ...] | None:
    """Check a field of `_RATES`: one number, or None where it may be left out, or a tuple for a list.

    Raises: InputError unless every number is finite and from `low` to `high`.
    """
    if name in _LISTS:
        values = value if isinstance(value, (list, tuple)) else [value]
        return tuple(_rate(name, number, low, high) for number in values)
    return None if value is None and name in _OPTIONAL else _rate(name, value, low, high)


def _rate(name: str, value: object, low: float, high: float) -> float:
    return require_float(name, value, low, high, f"use one finite number from {low:g} to {high:g}")


def _texts(value: object) -> tuple[tuple[str, int], ...]:
    """Check text names with their repeats. Raises: InputError E-PARAM-TEXTS."""
    try:
        pairs = tuple((name, repeat) for name, repeat in value)  # type: ignore[union-attr]
    except (TypeError, ValueError):
        pairs = ()
    if not pairs or not all(isinstance(n, str) and n and type(r) is int and 1 <= r <= 1000 for n, r in pairs):
        raise InputError('texts must be pairs of a text and its repeats, such as [["sotu", 2]].', code="E-PARAM-TEXTS")
    return pairs
