"""`tables`: the paper's tables, with our rows beside the published ones."""

from __future__ import annotations

import platform
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig
from torch import nn

from varestorer.commands.entry import OK, Command, say
from varestorer.commands.options import TablesOptions
from varestorer.evaluation.cost import add_published_restorer, cost_of, measure, num_trained
from varestorer.evaluation.paper_tables import SystemRecord, read_records, table_1, table_2, table_3, table_varsr
from varestorer.evaluation.tables import Table, to_markdown, write_tables
from varestorer.systems import SYSTEMS, load
from varestorer.systems.varestorer import VARestorer
from varestorer.utils.device import pick_device
from varestorer.utils.errors import UsageError, reason
from varestorer.utils.files import check_writable, expand_user
from varestorer.utils.schema import typed

PAPER_MODEL = "2b"  # the paper's, which has a restorer in front although the config names no file
TITLES = {number: f"Table {number} of VARestorer" for number in ("1", "2", "3")} | {"varsr": "VARSR and its ablations"}
MAX_TIMED_ON_CPU = 1e9  # parameters


def tables(cfg: DictConfig) -> int:
    """Assemble the table that `cfg` asks for.

    Raises:
        UserError: a folder or a model cannot be read; UsageError: the command asks for the impossible.
    """
    options = typed(TablesOptions, cfg)
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
    records = read_records(_listed(options.runs))
    if number == "1":
        return table_1(records)
    if number == "varsr":
        return table_varsr(records)
    return table_3(records) if number == "3" else table_2(system_records(options), records)


def system_records(options: TablesOptions) -> list[SystemRecord]:
    """Count every network that `options` names, and time them in turns."""
    device = pick_device(options.device)
    encoder = None if options.text_encoder is None else _text_encoder(options.text_encoder)
    systems = {name: _from_config(name, options.seed, "meta") for name in _model_names()}
    if options.ckpt is not None:
        systems[Path(options.ckpt).name] = load(options.ckpt, device=device, merge=True)
    costs = {label: cost_of(system, encoder) for label, system in systems.items()}
    timed = {
        label: _from_config(label, options.seed, device) if system.device.type == "meta" else system
        for label, system in systems.items()
        if _is_timed(options, sum(cost.params for cost in costs[label].values()), device)
    }
    measured = measure(timed, options.repeats)
    where = {label: _where(system, options.repeats) for label, system in timed.items()}
    return [
        SystemRecord(label, s.tile, num_trained(s), costs[label], measured.get(label), where.get(label, ""))
        for label, s in systems.items()
    ]


def _model_names() -> list[str]:
    """What `model=` names: one config of its group, or several, which the composed config holds mixed together."""
    given = OverridesParser.create().parse_overrides(list(HydraConfig.get().overrides.task))
    values = [override.value() for override in given if override.key_or_group == "model"]
    return _listed(values[-1]) if values else []


def _from_config(name: str, seed: int, device: torch.device | str) -> VARestorer:
    """The network of `configs/model/<name>.yaml` with random weights (none on the meta device), adapters merged."""
    system_name = next((known for known in SYSTEMS if name.startswith(known)), "varestorer")
    cfg = hydra.compose("tables", [f"system={system_name}", f"model={name}", f"seed={seed}"])
    with torch.device("meta") if str(device) == "meta" else nullcontext():
        system: VARestorer = hydra.utils.instantiate(cfg.model)
    if name == PAPER_MODEL and system.restorer is None:
        add_published_restorer(system)
    return system.merge_adapters().to(device).eval().requires_grad_(False)


def _text_encoder(folder: str) -> nn.Module:
    """A T5 encoder of the folder's sizes, without weights.

    Raises:
        UsageError: the folder describes none.
    """
    from transformers import AutoConfig, T5EncoderModel

    try:
        config = AutoConfig.from_pretrained(expand_user(folder), local_files_only=True)
        with torch.device("meta"):
            return T5EncoderModel(config).eval()
    except (OSError, ValueError, AttributeError) as error:
        raise UsageError(f"text_encoder={folder} has no config.json of a T5 ({reason(error)})") from error


def _is_timed(options: TablesOptions, num_parameters: int, device: torch.device) -> bool:
    if options.measure is not None:
        return bool(options.measure)
    return device.type == "cuda" or num_parameters < MAX_TIMED_ON_CPU


def _where(system: VARestorer, repeats: int) -> str:
    """Machine and precision of a measurement, in words."""
    device = system.device
    machine = f"{_cpu_name()}, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        machine = torch.cuda.get_device_name(device)
    dtype = str(next(system.transformer.blocks.parameters()).dtype).removeprefix("torch.")
    return f"median of {repeats} on {machine}, torch {torch.__version__}, blocks in {dtype}"


def _cpu_name() -> str:
    """The processor's name as Linux tells it, else what Python knows."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _listed(value: Any) -> list[str]:
    """A list of texts; one alone is meant as a list of one, null as none."""
    if value is None:
        return []
    return [str(item) for item in value] if isinstance(value, list) else [str(value)]


COMMAND = Command("tables", "tables", tables, schema=TablesOptions)
