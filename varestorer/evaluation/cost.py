"""What a restoration costs, stage by stage: parameters, floating-point operations, seconds and memory.

Operations are counted by torch's counter on the meta device, so a network of any size is counted in seconds and
without its weights. A multiplication and an addition are two operations. What the counter does not know
(normalisation, activations) counts as none.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from varestorer.conditioning.restorer import PUBLISHED_SIZES, Restorer
from varestorer.evaluation.memory import peak_memory
from varestorer.systems.varestorer import VARestorer
from varestorer.utils.iqa_sandbox import isolated_rng, quiet
from varestorer.utils.seeds import torch_generator

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
        stages: seconds of each stage, measured apart: waiting for a GPU after each stage takes time too.
        peak_bytes: weights and working memory; None where it cannot be told.
    """

    seconds: float
    stages: dict[str, float]
    peak_bytes: int | None


def stages(system: VARestorer) -> dict[str, nn.Module]:
    """The networks of a system in the order in which an image passes them."""
    found = {
        RESTORER: system.restorer,
        ENCODER: system.tokenizer.encoder,
        TRANSFORMER: system.transformer,
        DECODER: system.tokenizer.decoder,
    }
    return {name: module for name, module in found.items() if module is not None}


def cost_of(system: VARestorer, text_encoder: nn.Module | None = None, prompt_tokens: int = 512) -> dict[str, Cost]:
    """Count what restoring one square of side `tile` costs, stage by stage.

    Adapters count as they are: merged they cost nothing.

    Args:
        system: on any device; its weights are not used.
        text_encoder: called with `input_ids`; None: no prompt, whose features are parameters of the transformer.
        prompt_tokens: length of the prompt.
    Returns:
        stage -> cost; the parameters of all stages are those of the system and of the text encoder.
    """
    twin = _without_weights(system)
    image_13tt = torch.empty(1, 3, twin.tile, twin.tile, device="meta")
    with FlopCounterMode(display=False) as counter:
        with spent_by(stages(twin), counter.get_total_flops) as spent:
            twin.restore_batch(image_13tt)
    costs = {name: Cost(_num_parameters(module), int(spent[name])) for name, module in stages(twin).items()}
    if text_encoder is not None:
        costs[TEXT] = _text_cost(text_encoder, prompt_tokens)
    return costs


def add_published_restorer(system: VARestorer, seed: int = 0) -> None:
    """Put a restorer of the published sizes, with random weights, in front of a system that has none."""
    from spandrel.architectures.SwinIR import SwinIR

    with quiet(), isolated_rng(seed):
        network = SwinIR(**PUBLISHED_SIZES)
    restorer = Restorer(network, multiple=PUBLISHED_MULTIPLE).to(system.device)
    system.restorer = system.conditioner.restorer = restorer


def num_trained(system: VARestorer) -> int:
    """Parameters that the paper's training changes: the adapters, or the whole transformer where it has none.

    Of a merged system, those of the adapters it had.
    """
    if system.student_config.merged:
        with torch.device("meta"):
            system = VARestorer(**system.config | {"student": asdict(replace(system.student_config, merged=False))})
    adapters = [p.numel() for name, p in system.transformer.named_parameters() if ".lora_" in name]
    return sum(adapters) or _num_parameters(system.transformer)


def measure(systems: Mapping[str, VARestorer], repeats: int = 5) -> dict[str, Measurement]:
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
            clock = _clock(system.device)
            start = clock()
            system.restore_batch(images[name])
            wholes[name].append(clock() - start)
            with spent_by(stages(system), clock) as spent:
                system.restore_batch(images[name])
            parts[name].append(spent)
    return {
        name: Measurement(
            seconds=statistics.median(wholes[name]),
            stages={stage: statistics.median(part[stage] for part in parts[name]) for stage in stages(system)},
            peak_bytes=_peak(system, images[name]),
        )
        for name, system in systems.items()
    }


@contextmanager
def spent_by(modules: Mapping[str, nn.Module], reading: Callable[[], float]) -> Iterator[dict[str, float]]:
    """How much a growing reading (a clock, a counter) grows inside each module, summed over its calls.

    Args:
        modules: by name; none inside another.
        reading: asked before and after each call.
    """
    spent = dict.fromkeys(modules, 0.0)

    def before(name: str) -> Callable[..., None]:
        def hook(*args: Any) -> None:
            spent[name] -= reading()

        return hook

    def after(name: str) -> Callable[..., None]:
        def hook(*args: Any) -> None:
            spent[name] += reading()

        return hook

    hooks = [module.register_forward_pre_hook(before(name)) for name, module in modules.items()]
    hooks += [module.register_forward_hook(after(name)) for name, module in modules.items()]
    try:
        yield spent
    finally:
        for handle in hooks:
            handle.remove()


def _without_weights(system: VARestorer) -> VARestorer:
    """A system of the same sizes on the meta device."""
    if system.device.type == "meta":
        return copy.deepcopy(system).eval().requires_grad_(False)
    with torch.device("meta"):
        twin = VARestorer(**system.config)
    if system.restorer is not None:
        twin.restorer = twin.conditioner.restorer = copy.deepcopy(system.restorer).to("meta")
    return twin.eval().requires_grad_(False)


def _text_cost(text_encoder: nn.Module, prompt_tokens: int) -> Cost:
    """Of one prompt; the encoder is moved to the meta device."""
    tokens_1T = torch.empty(1, prompt_tokens, dtype=torch.long, device="meta")
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        text_encoder.to("meta")(input_ids=tokens_1T)
    return Cost(_num_parameters(text_encoder), counter.get_total_flops())


def _num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _image(system: VARestorer) -> Tensor:
    side = system.tile
    return torch.rand(1, 3, side, side, generator=torch_generator(0, "cost")).to(system.device)


def _clock(device: torch.device) -> Callable[[], float]:
    """Seconds, read when the device has finished its work."""

    def read() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        elif device.type == "mps":
            torch.mps.synchronize()
        return time.perf_counter()

    return read


def _peak(system: VARestorer, image_13tt: Tensor) -> int | None:
    working = peak_memory(lambda: system.restore_batch(image_13tt), system.device)
    weights = sum(tensor.numel() * tensor.element_size() for tensor in system.state_dict().values())
    return None if working is None else weights + working
