"""`regtool finetune-oneshot`: a network learns on the very pair it registers, or on a site's few pairs, and is kept (Ferrante et al. 2018)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from regtool.config.choices import NO_MODEL
from regtool.config.schema import Parameters, Run
from regtool.config.toml import merged
from regtool.errors import InputError, UsageError
from regtool.io.files import sha256
from regtool.io.pairs import read_list
from regtool.methods import read_parameters
from regtool.methods.model_file import save_model
from regtool.methods.pretrained import pretrained
from regtool.methods.resolve import Resolved, resolve
from regtool.registration.adaptation import ProgressCallback
from regtool.report.schema import Change, Finetuning, ImageFacts, LearnedFrom, LearnedPair, ModelFacts, RegistrationReport, Similarity, TrainingReport
from regtool.result.outcome import Outcome
from regtool.runtime import Graceful, uninterrupted
from regtool.training.run import Watch
from regtool.training.run_folder import MODEL
from regtool.workflows import register, train

PAIR = {"refine": {"iterations": 0}, "oneshot": {"iterations": 50}}
CONVERGED = {"oneshot": {"iterations": 3000, "patience": 300}}  # overrides; 3000: what the paper calls convergence
UNTIL = "until-converged"
SITE = {"train": {"steps": 500, "learning_rate": 1e-4, "validate_every": 20, "patience": 5, "checkpoint_every": 100, "log_every": 5}}
HELD_OUT = 0.25  # of a site's pairs; one at least


def steps_of_pair(iterations: str | None) -> dict[str, Any]:
    """What `--iterations` of one pair asks of the parameters. UsageError for what is neither a number above zero nor UNTIL."""
    if iterations is None:
        return {}
    return CONVERGED if iterations == UNTIL else {"oneshot": {"iterations": _number(iterations)}}


def steps_of_list(iterations: str | None) -> dict[str, Any]:
    """The same of a list of pairs."""
    if iterations is None:
        return {}
    return {"train": {"steps": CONVERGED["oneshot"]["iterations"] if iterations == UNTIL else _number(iterations)}}


def _number(iterations: str) -> int:
    if not iterations.isdecimal() or int(iterations) == 0:
        raise UsageError(f"--iterations {iterations}: expected a number above zero, or {UNTIL}", tip="50 steps are usual")
    return int(iterations)


def finetune(request: register.Request, from_scratch: bool = False, progress: ProgressCallback | None = None) -> register.Result:
    """`register` with a network that learns on the pair, from a model's weights or from scratch; the folder gets model.safetensors too.

    Defaults are those of `register` but for PAIR. The model file it starts from is only read. Of a time series the mean is registered. Raises what
    `register` raises; UsageError without a method, and for both a model and `from_scratch`.
    """
    if request.output is None:
        raise UsageError("no folder is named for the result and the model", tip="name one with -o")
    asked = read_parameters(request.parameter_file, request.overrides, PAIR)
    if from_scratch and pretrained(asked):
        raise UsageError(f"from scratch or from {asked.run.model}?", tip="--from-scratch goes without --model")
    run = {"time": "one", **({"model": NO_MODEL} if from_scratch else {})}
    request = replace(request, overrides=merged(request.overrides, _settled(asked, PAIR), {"run": run}))
    return register.register(request, progress, _resolved, _Adapted())


def finetune_site(request: train.Request, watch: Watch | None = None, graceful: Graceful = uninterrupted) -> TrainingReport | None:
    """`train` from a model's weights on a few pairs, until those held out get no better; returns the report.

    Defaults are those of `train` but for SITE, and HELD_OUT where no validation list is given. Raises what `train` raises; UsageError without a
    model, InputError where nothing can be held out.
    """
    asked = read_parameters(request.parameter_file, request.overrides, SITE)
    if not pretrained(asked):
        raise UsageError("a list of pairs adapts a trained model, and none is named", tip="name it with --model; `regtool train` learns from scratch")
    table = SITE
    if request.data is not None and request.validation is None:
        count = len(read_list(request.data))
        if count < 2:
            raise InputError(
                f"{request.data} lists one pair: none can be held out, and nothing would stop over-fitting",
                tip="list two at least or give --validation; a single pair: `regtool finetune-oneshot FIXED MOVING`",
            )
        table = {"train": {**SITE["train"], "validation_share": max(HELD_OUT, 1 / count)}}
        asked = read_parameters(request.parameter_file, request.overrides, table)
    return train.train(replace(request, overrides=merged(request.overrides, _settled(asked, table))), watch, graceful)


def _settled(asked: Parameters, table: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What the parameters that a verb has other defaults of come to, as overrides."""
    return {section: {key: getattr(getattr(asked, section), key) for key in keys} for section, keys in table.items()}


def _resolved(parameter_file: Path | None, overrides: Mapping[str, Any], ndim: int | None) -> Resolved:
    resolved = resolve(parameter_file, overrides, ndim)
    if resolved.parameters.method is None:
        raise UsageError(
            "neither model nor method is named: there is no network", tip="--model NAME|FILE, or -m METHOD; `regtool methods` lists them"
        )
    return resolved


class _Adapted:
    """The network that learned on the pair, as a model file with its card."""

    verb = "finetune-oneshot"

    def write(self, outcome: Outcome, report: RegistrationReport, stage: Path, name: str) -> RegistrationReport:
        """model.safetensors; `model` of the report becomes it, `finetuning` says how it came about."""
        learned, resolved = outcome.done[0].learned, outcome.start.resolved
        assert learned is not None
        card = resolved.card or {}
        record = Finetuning(
            parent=report.model if resolved.card is not None else None,
            pair=LearnedPair(
                fixed=_learned_from(outcome.start.fixed_source, report.fixed), moving=_learned_from(outcome.start.moving_source, report.moving)
            ),
            steps=len(learned.losses) - 1 if learned.losses else 0,
            best_step=learned.steps,
            learning_rate=learned.rate,
            loss=Change(before=learned.loss[0], after=learned.loss[1]),
            similarity=Similarity(name=learned.metric, before=learned.similarity[0], after=learned.similarity[1]),
            diverged=learned.diverged,
        )
        save_model(
            stage / MODEL,
            learned.engine,
            _of_model(resolved),
            name=name,
            training=record.model_dump(),
            licence=card.get("licence", ""),
            citation=card.get("citation", ""),
        )
        outputs = report.outputs.model_copy(update={"model": MODEL})
        model = ModelFacts(name=name, sha256=sha256(stage / MODEL))
        return report.model_copy(update={"finetuning": record, "model": model, "outputs": outputs})


def _learned_from(source: Path | None, facts: ImageFacts) -> LearnedFrom:
    return LearnedFrom(file=None if source is None else source.name, sha256=facts.sha256)


def _of_model(resolved: Resolved) -> Parameters:
    """The parameters without what was true of this run alone; with the limit of the grid that a network learned from scratch on."""
    parameters = resolved.parameters.model_copy(update={"run": Run(seed=resolved.parameters.run.seed)})
    grid = parameters.grid
    if resolved.card is None and grid.size is None and grid.max_voxels is None:
        return parameters.model_copy(update={"grid": grid.model_copy(update={"max_voxels": grid.max_voxels_trained})})
    return parameters
