"""`tables`: the paper's tables, with our rows beside the published ones."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from torch import nn

from varestorer.benchmark.counting import count
from varestorer.benchmark.measure import measure
from varestorer.benchmark.networks import Source, num_parameters, num_trained, restoring_counts
from varestorer.benchmark.restore import restoring, with_weights
from varestorer.benchmark.roofline import device_description
from varestorer.commands.entry import OK, Command, as_list, say
from varestorer.commands.options import TablesOptions
from varestorer.evaluation.pairwise import preference_tables, read_answers, read_study
from varestorer.evaluation.paper_tables import (
    StageRecord,
    SystemRecord,
    read_records,
    table_1,
    table_2,
    table_3,
    table_varsr,
)
from varestorer.evaluation.small_models import SIDE, open_models, table_small
from varestorer.evaluation.tables import Table, to_markdown, write_tables
from varestorer.systems import SYSTEMS
from varestorer.utils.device import pick_device
from varestorer.utils.errors import UsageError, reason
from varestorer.utils.files import check_writable, expand_user
from varestorer.utils.seeds import torch_generator

TITLES = {number: f"Table {number} of VARestorer" for number in ("1", "2", "3")} | {
    "varsr": "VARSR and its ablations",
    "preference": "What people prefer",
    "small": "Small models",
}
MAX_TIMED_ON_CPU = 1e9  # parameters
PROMPT_TOKENS = 512  # of the published text encoder


def tables(options: TablesOptions) -> int:
    """Assemble the table that is asked for.

    UserError if a folder or a model cannot be read; UsageError if the command asks for the impossible.
    """
    number = str(options.table)
    if number not in TITLES:
        raise UsageError(f"table must be {', '.join(TITLES)}, got {number}")
    out = expand_user(options.out)
    check_writable(out, "out")
    found = _tables(options, number)
    title = TITLES[number]
    written = write_tables(found, title, out, f"table{number}")
    say(to_markdown(found, title))
    say(f"wrote {', '.join(path.name for path in written)} to {out}")
    return OK


def _tables(options: TablesOptions, number: str) -> list[Table]:
    if number != "2" and (_model_names() or options.ckpt is not None):
        raise UsageError(f"model= and ckpt= are for table=2; table={number} takes runs=")
    if number == "preference":
        if len(as_list(options.runs)) != 1:
            raise UsageError("table=preference takes one folder in runs=: the out= of eval compare=[...] pairwise=true")
        study = read_study(as_list(options.runs)[0])
        return preference_tables(study, read_answers(study, as_list(options.answers)))
    if number != "small" and (options.models or options.licenses):
        raise UsageError(f"models= and licenses= are for table=small; table={number} takes runs=")
    records = read_records(as_list(options.runs))
    if number == "small":
        models = open_models(_labeled("models", options.models), _labeled("licenses", options.licenses))
        picture_3hw = torch.rand(3, SIDE, SIDE, generator=torch_generator(0))
        works = {label: partial(model.source.make, "picture", picture_3hw) for label, model in models.items()}
        with torch.no_grad():
            found = measure(works, options.repeats, 1, torch.device("cpu"))
        return table_small(records, models, {label: measured.whole.median for label, measured in found.items()})
    if number == "1":
        return table_1(records)
    if number == "varsr":
        return table_varsr(records)
    return table_3(records) if number == "3" else table_2(system_records(options), records)


def _labeled(key: str, given: list[str] | None) -> dict[str, str]:
    """`label=value` of each entry; UsageError for one without a label."""
    pairs = [entry.partition("=") for entry in given or []]
    if wrong := ["".join(pair) for pair in pairs if not (pair[0] and pair[2])]:
        raise UsageError(f"{key} must be a list of 'label=...', got {wrong[0]}")
    return {label: value for label, _, value in pairs}


def system_records(options: TablesOptions) -> list[SystemRecord]:
    """Count every network that `options` names, and time them in turns."""
    device = pick_device(options.device)
    sources = {name: _source(name, options.seed) for name in _model_names()}
    if options.ckpt is not None:
        sources[Path(options.ckpt).name] = Source(Path(options.ckpt).name, {}, options.ckpt)
    blanks = {label: source.blank(merged=True) for label, source in sources.items()}
    parameters_of = {label: num_parameters(blank) for label, blank in blanks.items()}
    timed = {}
    for label, source in sources.items():
        is_quick = device.type == "cuda" or sum(parameters_of[label].values()) < MAX_TIMED_ON_CPU
        if is_quick if options.measure is None else options.measure:
            timed[label] = source.system(device, merged=True)
    found = measure({label: restoring(system, 1) for label, system in timed.items()}, options.repeats, 1, device)
    of_text = {}
    if options.text_encoder is not None:
        encoder = _text_encoder(options.text_encoder)
        tokens_1T = torch.empty(1, PROMPT_TOKENS, dtype=torch.long, device="meta")
        flops = sum(cost.flops for cost in count(lambda: encoder(input_ids=tokens_1T)).values())
        of_text["text encoder"] = StageRecord(sum(p.numel() for p in encoder.parameters()), flops)
    records = []
    for label, blank in blanks.items():
        parameters, counts = parameters_of[label], restoring_counts(blank)
        measured = with_weights(found[label], timed[label]) if label in found else None
        parts = {} if measured is None else measured.parts
        stages = {
            part: StageRecord(
                parameters.get(part, 0),
                counts[part].flops if part in counts else 0,
                parts[part].median if part in parts else None,
            )
            for part in dict.fromkeys([*parameters, *counts])
        }
        record = SystemRecord(label, blank.tile, num_trained(blank), stages | of_text)
        if measured is not None:
            dtype = str(next(timed[label].transformer.blocks.parameters()).dtype).removeprefix("torch.")
            where = f"median of {len(measured.whole.seconds)} on {device_description(timed[label].device)}, "
            where += f"torch {torch.__version__}, blocks in {dtype}"
            record = replace(record, seconds=measured.whole.median, peak_bytes=measured.peak_bytes, where=where)
        records.append(record)
    return records


def _model_names() -> list[str]:
    """What `model=` names: one config of its group, or several, which the composed config holds mixed together."""
    given = OverridesParser.create().parse_overrides(list(HydraConfig.get().overrides.task))
    values = [override.value() for override in given if override.key_or_group == "model"]
    return as_list(values[-1]) if values else []


def _source(name: str, seed: int) -> Source:
    """The network of `configs/model/<name>.yaml` with random weights."""
    system_name = next((known for known in SYSTEMS if name.startswith(known)), "varestorer")
    cfg = hydra.compose("tables", [f"system={system_name}", f"model={name}", f"seed={seed}"])
    sizes: Any = OmegaConf.to_container(cfg.model, resolve=True)
    return Source(name, sizes, restorer="auto", seed=seed)


def _text_encoder(folder: str) -> nn.Module:
    """A T5 encoder of the folder's sizes, without weights; UsageError if the folder describes none."""
    from transformers import AutoConfig, T5EncoderModel

    try:
        config = AutoConfig.from_pretrained(expand_user(folder), local_files_only=True)
        with torch.device("meta"):
            return T5EncoderModel(config).eval()
    except (OSError, ValueError, AttributeError) as error:
        raise UsageError(f"text_encoder={folder} has no config.json of a T5 ({reason(error)})") from error


COMMAND = Command("tables", tables, TablesOptions)
