"""What a restoration costs, stage by stage: parameters, floating-point operations, seconds and memory.

Operations are counted by torch's counter on the meta device, so a network of any size is counted in seconds and
without its weights. A multiplication and an addition are two operations. What the counter does not know
(normalisation, activations) counts as none.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from varestorer.conditioning.restorer import PUBLISHED_SIZES, Restorer, new_restorer
from varestorer.evaluation.memory import peak_memory
from varestorer.systems.base import System
from varestorer.systems.varestorer import VARestorer
from varestorer.tokenizer.autoencoder import init_weights as init_tokenizer_weights
from varestorer.transformer.adapters import init_adapters
from varestorer.utils.device import num_bytes
from varestorer.utils.iqa_sandbox import quiet
from varestorer.utils.seeds import isolated_rng, torch_generator
from varestorer.utils.timing import Clock
from varestorer.weights.bundle import shipped
from varestorer.weights.restorers import load_restorer

RESTORER, ENCODER, TRANSFORMER, DECODER, TEXT = "restorer", "VAE encoder", "transformer", "VAE decoder", "text encoder"

PUBLISHED_MULTIPLE = 64
"""Sides that the published restorer sees are multiples of this, pixels."""


@dataclass(frozen=True)
class Cost:
    """What a stage costs for one square of side `tile`.

    Attributes:
        params: its parameters.
        flops: floating-point operations, two for a multiplication with its addition.
    """

    params: int
    flops: int


@dataclass(frozen=True)
class Measurement:
    """What restoring one square of side `tile` took; medians.

    Attributes:
        seconds: of the whole.
        stages: seconds of each network, measured in runs of their own; what lies between is the transformer's.
        peak_bytes: weights and working memory; None where it cannot be told.
    """

    seconds: float
    stages: dict[str, float]
    peak_bytes: int | None


def cost_of(system: System, text_encoder: nn.Module | None = None, prompt_tokens: int = 512) -> dict[str, Cost]:
    """Count what restoring one square of side `tile` costs, stage by stage.

    Adapters count as they are: merged they cost nothing.

    Args:
        system: on any device; its weights are not used.
        text_encoder: called with `input_ids`; None: no prompt, whose features are parameters of the transformer.
        prompt_tokens: length of the prompt.
    Returns:
        stage -> cost; the parameters of all stages are those of the system and of the text encoder.
    """
    twin = without_weights(system)
    flops = flops_of(twin)
    costs = {name: Cost(sum(map(_num_parameters, modules)), flops[name]) for name, modules in twin.networks.items()}
    if text_encoder is not None:
        costs[TEXT] = _text_cost(text_encoder, prompt_tokens)
    return costs


def flops_of(twin: Any, **options: Any) -> dict[str, int]:
    """Operations of each stage for one square, by torch's counter.

    Args:
        twin: a system on the meta device.
        options: of `restore_batch`.
    Returns:
        stage -> operations; what lies between the networks, and what is made of the condition, in whatever order,
        count as the transformer's.
    """
    image_13tt = torch.empty(1, 3, twin.tile, twin.tile, device="meta")
    with FlopCounterMode(display=False) as counter:
        with spent_by(twin.networks, counter.get_total_flops) as spent:
            twin.restore_batch(image_13tt, **options)
    return {name: int(flops) for name, flops in _with_rest(spent, counter.get_total_flops()).items()}


def _with_rest(spent: Mapping[str, float], whole: float) -> dict[str, float]:
    """What was spent outside all networks counts as the transformer's, which is not always called as a whole."""
    others = sum(value for name, value in spent.items() if name != TRANSFORMER)
    return {name: whole - others if name == TRANSFORMER else value for name, value in spent.items()}


def add_published_restorer(system: VARestorer, seed: int = 0) -> None:
    """Put a restorer of the published sizes, with random weights, in front of a system that has none."""
    from spandrel.architectures.SwinIR import SwinIR

    with quiet(), isolated_rng(seed):
        network = SwinIR(**PUBLISHED_SIZES)
    system.restorer = Restorer(network, multiple=PUBLISHED_MULTIPLE).to(system.device)


def add_restorer(system: VARestorer, named: str | dict[str, int] | None, seed: int = 0) -> None:
    """Put what `model.restorer` names in front of a system that has none.

    Args:
        system: on its device.
        named: the sizes of a new restorer; or a file, a run or a bundle, for which one of the published sizes stands in
            where it is not there; None for none.
        seed: of random weights.
    """
    if named is None:
        return
    if isinstance(named, str) and not shipped(named).exists():
        add_published_restorer(system, seed)
        return
    restorer = load_restorer(named) if isinstance(named, str) else new_restorer(**named, seed=seed)
    system.restorer = restorer.to(system.device)


def random_system(sizes: Mapping[str, Any], device: torch.device, seed: int = 0) -> VARestorer:
    """A system without a restorer in evaluation mode, its weights drawn on the device itself.

    Args:
        sizes: "schedule", "tokenizer", "transformer" and "student", as the constructor of `VARestorer` takes them.
        device: where it lives from the start: its weights never pass through the memory of the host.
        seed: of the weights.
    """
    with torch.device("meta"):
        system = VARestorer(**sizes)
    system.to_empty(device=device)
    init_tokenizer_weights(system.tokenizer, torch_generator(seed, "tokenizer", device=device))
    system.transformer.init_weights(torch_generator(seed, "transformer", device=device))
    if system.student_config.lora_rank and not system.student_config.merged:
        init_adapters(system.transformer, torch_generator(seed, "adapters", device=device))
    system.tokenizer.to(memory_format=torch.channels_last)
    return system.eval().requires_grad_(False)


def num_trained(system: System) -> int:
    """Parameters that the paper's training changes: the adapters, or, where it has none, all but the frozen parts.

    Of a merged system, those of the adapters it had.
    """
    if system.student_config.merged:
        with torch.device("meta"):
            student = asdict(replace(system.student_config, merged=False))
            system = type(system)(**system.config | {"student": student})
    adapters = [p.numel() for name, p in system.transformer.named_parameters() if ".lora_" in name]
    frozen = (*system.tokenizer.parameters(), *system.networks.get(RESTORER, [nn.Identity()])[0].parameters())
    return sum(adapters) or _num_parameters(system) - sum(p.numel() for p in frozen)


def measure(systems: Mapping[str, System], repeats: int = 5) -> dict[str, Measurement]:
    """Time systems in turns, so that a machine's moods meet all of them, after one run that does not count.

    Args:
        systems: with their weights, each on its device.
        repeats: how often each is timed, as a whole and by stages.
    """
    images = {name: _image(system) for name, system in systems.items()}
    for name, system in systems.items():
        system.restore_batch(images[name])
    wholes: dict[str, list[float]] = {name: [] for name in systems}
    parts: dict[str, list[dict[str, float]]] = {name: [] for name in systems}
    for _ in range(repeats):
        for name, system in systems.items():
            clock = Clock(system.device)
            wholes[name].append(clock.time(partial(system.restore_batch, images[name])))
            start = clock.mark()
            with spent_by(system.networks, clock.mark, clock.between) as spent:
                system.restore_batch(images[name])
                end = clock.mark()
            parts[name].append(_with_rest(spent, clock.between(start, end)))
    return {
        name: Measurement(
            seconds=statistics.median(wholes[name]),
            stages={stage: statistics.median(part[stage] for part in parts[name]) for stage in system.networks},
            peak_bytes=_peak(system, images[name]),
        )
        for name, system in systems.items()
    }


@contextmanager
def spent_by(
    modules: Mapping[str, Iterable[nn.Module]],
    reading: Callable[[], Any],
    between: Callable[[Any, Any], float] = lambda start, end: end - start,
) -> Iterator[dict[str, float]]:
    """How much a growing reading (a clock, a counter) grows inside each module, summed over its calls.

    Args:
        modules: some by name; a call inside another module's call counts for that other one.
        reading: asked before and after each call.
        between: how much it grew from one reading to a later one; asked when the block ends.
    Yields:
        name -> growth; filled when the block ends.
    """
    spent: dict[str, float] = {}
    readings: dict[str, list[Any]] = {name: [] for name in modules}
    running: list[str] = []

    def before(name: str, *_: Any) -> None:
        if not running:
            readings[name].append(reading())
        running.append(name)

    def after(*_: Any) -> None:
        name = running.pop()
        if not running:
            readings[name].append(reading())

    named = [(name, module) for name, some in modules.items() for module in some]
    hooks = [module.register_forward_pre_hook(partial(before, name)) for name, module in named]
    hooks += [module.register_forward_hook(after) for _, module in named]
    try:
        yield spent
    finally:
        for handle in hooks:
            handle.remove()
    for name, taken in readings.items():
        spent[name] = sum(map(between, taken[::2], taken[1::2]))


def without_weights(system: Any) -> Any:
    """A system of the same sizes on the meta device."""
    if system.device.type == "meta":
        return copy.deepcopy(system).eval().requires_grad_(False)
    with torch.device("meta"):
        twin = type(system)(**system.config)
    if isinstance(system, VARestorer) and system.restorer is not None:
        twin.restorer = copy.deepcopy(system.restorer).to("meta")
    return twin.eval().requires_grad_(False)


def _text_cost(text_encoder: nn.Module, prompt_tokens: int) -> Cost:
    """Of one prompt; the encoder is moved to the meta device."""
    tokens_1T = torch.empty(1, prompt_tokens, dtype=torch.long, device="meta")
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        text_encoder.to("meta")(input_ids=tokens_1T)
    return Cost(_num_parameters(text_encoder), counter.get_total_flops())


def _num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _image(system: System) -> Tensor:
    side = system.tile
    return torch.rand(1, 3, side, side, generator=torch_generator(0, "cost")).to(system.device)


def _peak(system: System, image_13tt: Tensor) -> int | None:
    working = peak_memory(lambda: system.restore_batch(image_13tt), system.device)
    weights = num_bytes(system.state_dict().values())
    return None if working is None else weights + working
