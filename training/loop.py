"""Train a model: float32 masters, AdamW, two stages, and a run folder that survives interruptions.

    run.json              the configuration, the corpus, versions and hardware; for each resumption its step and machine
    tokenizer.json        of the corpus
    log.jsonl             one line a step: step, loss (cross entropy, with a teacher too), lr, weight_decay, tokens,
                          tokens_per_second, seconds, mode, and held_out_loss now and then
    checkpoint/           the latest state (`checkpoint.py`); previous/ the one before, step-<n>/ states that are kept
    lock                  held while a process trains here

A step depends only on the checkpoint before it: windows are chosen by the step's number, the mode by the schedule, and
nothing else is random. So a run that was killed and resumed has the losses of an uninterrupted one on the same
machine with the same number of threads. Several processes (torchrun or accelerate launch) share each batch.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from core.disk import disk_errors
from core.errors import ArtifactError, InputError, NumericError, ResourceError
from core.progress import Progress, silent
from core.provenance import provenance
from core.storage import file_lock, write_file
from training.bitlinear import set_mode
from training.checkpoint import load_optimizer, load_weights, newest, read_state, save_checkpoint, save_latest
from training.config import TrainConfig
from training.corpus import Corpus, batch_rows, load_corpus, require_same
from training.distill import divergence, load_teacher, start_from, teacher_logits

logger = logging.getLogger(__name__)


BETAS = (0.9, 0.95)
EVAL_WINDOWS = 16
DOCUMENT, LOG = "run.json", "log.jsonl"


@dataclass(frozen=True)
class TrainReport:
    """How a run ended: its last step, tokens, losses (nats per token; of a finished run those in its log), seconds of this
    process, and its folder."""

    name: str
    folder: str
    step: int
    tokens: int
    loss: float | None
    held_out_loss: float | None
    seconds: float
    mode: str
    compiled: bool

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain JSON types."""
        return asdict(self)


def train(
    config: TrainConfig, out: Path | str, *, resume: bool = False, progress: Progress = silent
) -> TrainReport:
    """Train a model from scratch, from `config.init_from`, or from the folder's latest checkpoint on.

    Args:
        out: run folder; created, or with `resume` continued (a fresh start when it has no checkpoint yet).
        progress: called every step with loss and tokens/s.
    Raises: InputError E-PARAM-OUT (holds a run already) or of the configuration, TextError, ArtifactError (damaged, or
        E-CKPT-TEXT: trained on other texts), NumericError E-NUM-LOSS (the loss is not finite; the last checkpoint stays),
        ResourceError E-DISK, E-TIME (another process trains in this folder).
    """
    out = Path(out)
    _check_free(out, resume)
    with _processes() as (rank, world):
        corpus = load_corpus(config.texts, vocab=config.vocab, progress=progress)
        run = _Run(config, out, corpus, rank, world)
        with _held(out, resume) if rank == 0 else nullcontext(), disk_errors(out):
            run.start(resume)
            return run.loop(progress)


def held_out_loss(model: nn.Module, tokens: Tensor, *, seq: int, windows: int | None = None, autocast: bool = False) -> Tensor:
    """Compute mean next-token losses [S] in nats of non-overlapping windows of `seq` from the start of tokens [T].

    Args: windows: the largest number. autocast: compute in bfloat16.
    Raises: InputError E-PARAM-SEQ when there is no whole window.
    """
    rows = tokens[: len(tokens) // seq * seq].view(-1, seq)[:windows]
    if not len(rows):
        raise InputError(f"The held-out text has {len(tokens):,} tokens, less than one window of {seq}.", code="E-PARAM-SEQ")
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    with torch.no_grad(), _autocast(device, autocast):
        losses = torch.stack([_cross_entropy(_logits(model, row), row) for row in rows[:, None].to(device)])
    model.train(was_training)
    return losses


class _Run:
    """One process of a run."""

    def __init__(self, config: TrainConfig, out: Path, corpus: Corpus, rank: int, world: int) -> None:
        if config.batch % world:
            raise InputError(f"batch {config.batch} cannot be shared by {world} processes: use a multiple.", code="E-PARAM-BATCH")
        self.config, self.out, self.corpus, self.rank, self.world = config, out, corpus, rank, world
        cuda = torch.cuda.is_available()
        self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
        self.model = config.build_model().to(self.device).train()
        matrices = [p for p in self.model.parameters() if p.dim() > 1]
        others = [p for p in self.model.parameters() if p.dim() == 1]
        self.optimizer = torch.optim.AdamW([{"params": matrices}, {"params": others}], betas=BETAS, fused=True)
        self.teacher = None
        if config.teacher is not None:
            self.teacher = load_teacher(config.teacher, corpus.tokenizer_file, seq=config.seq, device=str(self.device))
        self.step = 0

    def start(self, resume: bool) -> None:
        """Load an earlier state and cut the log back to it, or set up the folder. A run from `init_from` that keeps the step
        starts with the other run's log."""
        torch.manual_seed(self.config.seed)
        log, found = self.out / LOG, newest(self.out) if resume else None
        if found is not None:
            _check_same(self.config, found[1]["config"])
            self._take(*found, optimizer=True)
        elif self.config.init_from is not None:
            source = Path(os.path.expandvars(self.config.init_from))
            self._take(source, read_state(source), optimizer=self.config.resume_optimizer)
            if self.step >= self.config.steps:
                raise InputError(
                    f"init_from is at step {self.step:,}, this run has {self.config.steps:,}: give more tokens, or leave "
                    "resume_optimizer out.",
                    code="E-PARAM-INIT_FROM",
                )
            log = source.parent / LOG if self.step else log
        elif self.config.teacher_start:
            start_from(self.model, self.teacher)
        if self.rank == 0:
            write_file(self.out / LOG, _log_until(log, self.step))
            write_file(self.out / "tokenizer.json", self.corpus.tokenizer_file.read_bytes())
            document = self._document(read_document(self.out) if found else {})
            write_file(self.out / DOCUMENT, (json.dumps(document, indent=1) + "\n").encode())

    def _document(self, known: dict[str, Any]) -> dict[str, Any]:
        """Return `run.json` of a new run, or of a known one with this resumption added; the facts of its start stay."""
        here = {"processes": self.world, "device": str(self.device), **provenance()}
        config = {"config": self.config.to_dict()}
        if not known:
            return config | {"corpus": self.corpus.sources, "parameters": self.parameters, **here}
        if self.step == self.config.steps:
            return known | config
        return known | config | {"resumed": [*known.get("resumed", []), {"step": self.step, **here}]}

    @property
    def parameters(self) -> int:
        """Number of parameters, tied ones once."""
        return sum(p.numel() for p in self.model.parameters())

    def loop(self, progress: Progress) -> TrainReport:
        """Run the remaining steps."""
        config, begun = self.config, time.monotonic()
        forward, compiled = _compiled(self.model, config.compile)
        if self.world > 1:
            ids = None if self.device.index is None else [self.device.index]
            forward = nn.parallel.DistributedDataParallel(forward, device_ids=ids)
        loss, held_out = self._last_losses()
        mode = config.mode_at(max(self.step, 1))
        with (self.out / LOG).open("a", encoding="utf-8") if self.rank == 0 else nullcontext() as log:
            while self.step < config.steps:
                self.step += 1
                mode, started = config.mode_at(self.step), time.monotonic()
                loss = self._step(forward, mode)
                seconds = time.monotonic() - started
                entry = {
                    "step": self.step,
                    "loss": loss,
                    "lr": config.schedule.lr(self.step),
                    "weight_decay": config.schedule.weight_decay(self.step),
                    "tokens": self.step * config.batch * config.seq,
                    "tokens_per_second": round(config.batch * config.seq / seconds, 1),
                    "seconds": round(seconds, 3),
                    "mode": mode,
                }
                last = self.step == config.steps
                if log and len(self.corpus.held_out) >= config.seq and (last or self.step % config.eval_every == 0):
                    losses = held_out_loss(
                        self.model,
                        self.corpus.held_out,
                        seq=config.seq,
                        windows=EVAL_WINDOWS,
                        autocast=config.precision == "bf16",
                    )
                    entry["held_out_loss"] = held_out = float(losses.mean())
                if log:
                    log.write(json.dumps(entry) + "\n")
                    log.flush()
                    self._save(last)
                progress(
                    f"Training step {self.step:,} of {config.steps:,}: loss {loss:.3f}, {entry['tokens_per_second']:,.0f} "
                    "tokens/s",
                    self.step / config.steps,
                )
        return TrainReport(
            config.name,
            str(self.out),
            self.step,
            self.step * config.batch * config.seq,
            loss,
            held_out,
            round(time.monotonic() - begun, 1),
            mode,
            compiled,
        )

    def _last_losses(self) -> tuple[float | None, float | None]:
        """Return loss and held-out loss of the current step, None where the log does not have them."""
        entries = read_log(self.out / LOG) if self.rank == 0 else []
        last = next((entry for entry in reversed(entries) if entry["step"] == self.step), {})
        return last.get("loss"), last.get("held_out_loss")

    def _step(self, forward: nn.Module, mode: str) -> float:
        """Do one optimizer step. Returns: the mean cross entropy of the whole batch before it."""
        config, schedule = self.config, self.config.schedule
        if config.architecture == "bitnet":
            set_mode(self.model, mode, inputs=config.inputs)
        for group, decay in zip(self.optimizer.param_groups, (schedule.weight_decay(self.step), 0.0), strict=True):
            group["lr"], group["weight_decay"] = schedule.lr(self.step), decay  # gains and biases do not decay
        rows = batch_rows(self.corpus.train, step=self.step, batch=config.batch, seq=config.seq, seed=config.seed)
        rows = rows[self.rank :: self.world].to(self.device)
        aim = None if self.teacher is None else teacher_logits(self.teacher, rows)
        with _autocast(self.device, config.precision == "bf16"):
            logits = _logits(forward, rows)
        loss = _cross_entropy(logits, rows)
        share = config.teacher_weight
        (loss if aim is None else (1 - share) * loss + share * divergence(logits, aim)).backward()
        if config.clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), config.clip)
        mean = loss.detach()
        if self.world > 1:
            torch.distributed.all_reduce(mean)
            mean /= self.world
        if not math.isfinite(value := float(mean)):
            raise NumericError(
                f"The loss of step {self.step:,} is {value}: lower lr, or set clip. The last checkpoint is kept.",
                code="E-NUM-LOSS",
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return value

    def _save(self, last: bool) -> None:
        """Save the checkpoints that are due after this step."""
        config = self.config
        kept = self.step in {round(share * config.steps) for share in config.keep_at}
        if not (last or kept or self.step % config.checkpoint_every == 0):
            return
        state = {
            "step": self.step,
            "tokens": self.step * config.batch * config.seq,
            "mode": config.mode_at(self.step),
            "config": config.to_dict(),
            "corpus": self.corpus.sources,
        }
        save_latest(self.out, self.model, self.optimizer, state)
        if kept:
            save_checkpoint(self.out / f"step-{self.step}", self.model, self.optimizer, state)

    def _take(self, folder: Path, state: dict[str, Any], *, optimizer: bool) -> None:
        """Load the weights of a checkpoint that was trained on these texts, and if asked its optimizer states and step."""
        known = state.get("corpus") or read_document(folder.parent).get("corpus")  # earlier versions kept it only there
        if known:
            require_same(self.corpus, known, f"the checkpoint {folder.name!r}")
        load_weights(folder, self.model)
        if optimizer:
            load_optimizer(folder, self.model, self.optimizer)
            self.step = state["step"]


def _logits(model: nn.Module, rows: Tensor) -> Tensor:
    """Compute the logits of windows [B, T] for the next tokens: [B, T - 1, V] float32."""
    return model(input_ids=rows, use_cache=False).logits[:, :-1].float()


def _cross_entropy(logits: Tensor, rows: Tensor) -> Tensor:
    """Compute the mean cross entropy of logits [B, T - 1, V] and the next tokens of windows [B, T]."""
    return cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


def _autocast(device: torch.device, enabled: bool) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


def _compiled(model: nn.Module, choice: str) -> tuple[nn.Module, bool]:
    """Return the compiled model, or the model itself where compiling is off or does not work here."""
    if choice == "no":
        return model, False
    try:
        torch.compile(lambda x: x * 2 + 1)(torch.ones(8, device=next(model.parameters()).device))
    except (RuntimeError, OSError, ImportError) as error:  # no compiler, or one that does not work
        logger.info("training runs uncompiled: %s", type(error).__name__)
        return model, False
    return torch.compile(model, dynamic=False), True


def _check_same(config: TrainConfig, stored: dict[str, Any]) -> None:
    """Check that a run is continued under its first configuration, except for fields that do not change its losses."""
    free = {"checkpoint_every", "eval_every", "keep_at", "name"}
    own, stored = config.to_dict(), TrainConfig.from_dict(stored).to_dict()  # fields added since hold their default
    differing = sorted(name for name in own if name not in free and own[name] != stored[name])
    if differing:
        raise InputError(
            f"The run began with another {differing[0]} ({str(stored[differing[0]])[:40]}, now "
            f"{str(own[differing[0]])[:40]}): use its configuration, or another folder.",
            code="E-PARAM-CONFIG",
        )


def _check_free(out: Path, resume: bool) -> None:
    if (out / DOCUMENT).exists() and not resume:
        raise InputError(f"{out.name!r} holds a run: continue it with --resume, or name another folder.", code="E-PARAM-OUT")


@contextmanager
def _held(out: Path, resume: bool) -> Iterator[None]:
    """Keep other processes from training in the folder; check again that it is free, as another may have been faster.

    Raises: ResourceError E-TIME at once where another process trains.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(file_lock(out / "lock", timeout=0))
        except ResourceError as error:
            if error.code != "E-TIME":
                raise
            raise ResourceError(f"Another process trains in the folder {out.name!r}. {error}", code=error.code) from error
        _check_free(out, resume)
        yield


def read_document(run: Path) -> dict[str, Any]:
    """Read `run.json` of a folder; an empty dictionary if no readable one is there."""
    try:
        document = json.loads((run / DOCUMENT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return document if isinstance(document, dict) else {}


def _log_until(path: Path, step: int) -> bytes:
    """Return a log without the lines after `step`, whose steps are repeated, and without a line cut short by a kill."""
    entries = read_log(path) if path.exists() else []
    return "".join(json.dumps(entry) + "\n" for entry in entries if entry["step"] <= step).encode()


def read_log(path: Path | str) -> list[dict[str, Any]]:
    """Read the entries of a run's log, in order; an incomplete last line is left out. Raises: ArtifactError E-CKPT-BAD."""
    entries = []
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines(keepends=True)
        for line in lines:
            if line.endswith("\n"):
                entries.append(json.loads(line))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"The log {Path(path).name!r} cannot be read: name the folder of a run.") from error
    return entries


@contextmanager
def _processes() -> Iterator[tuple[int, int]]:
    """Yield (rank, number of processes): (0, 1), or as torchrun and accelerate launch state in the environment."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield 0, 1
        return
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    torch.distributed.init_process_group("nccl" if cuda else "gloo")
    try:
        yield torch.distributed.get_rank(), world
    finally:
        torch.distributed.destroy_process_group()
