"""How many replicas a model has: from what was asked for to bounds that hold."""

from dataclasses import dataclass

from flagscale.errors import ConfigError, Fault
from flagscale.runner.config.tasks import ServeModel

MOST_REPLICAS = 256


@dataclass(frozen=True, slots=True)
class Scaling:
    """How many replicas there are. The delays are seconds; target is of requests in flight and waiting, a replica."""

    initial: int = 1
    lowest: int = 1
    highest: int = 1
    target: float = 2.0
    upscale_delay_s: float = 30.0
    downscale_delay_s: float = 600.0


def scaling_of(index: int, model: ServeModel) -> Scaling:
    """
    Raises:
        ConfigError: the bounds contradict each other.
    """
    asked = model.resources
    lowest = asked.min_replicas if asked.min_replicas is not None else asked.num_replicas or 1
    highest = asked.max_replicas or max(lowest, asked.num_replicas or 1)
    initial = asked.num_replicas or lowest
    path = f"serve.{index}.resources"
    if lowest < 1:
        raise ConfigError([Fault(f"{path}.min_replicas", "is 0", expected="1 or more: a service keeps a replica")])
    if highest > MOST_REPLICAS:
        raise ConfigError([Fault(f"{path}.max_replicas", f"is {highest}", expected=f"at most {MOST_REPLICAS}")])
    if not lowest <= initial <= highest:
        text = f"min_replicas {lowest}, num_replicas {initial}, max_replicas {highest} are not in this order"
        raise ConfigError([Fault(path, text)])
    told = {
        "target": asked.target_ongoing_requests,
        "upscale_delay_s": asked.upscale_delay_s,
        "downscale_delay_s": asked.downscale_delay_s,
    }
    return Scaling(initial, lowest, highest, **{name: value for name, value in told.items() if value is not None})
