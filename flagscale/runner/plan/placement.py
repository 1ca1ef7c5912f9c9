"""Which host and which of its chips each replica of a service gets.

First fit, host by host, each replica's chips next to each other. A replica that no single host can hold takes whole
hosts. How many chips this machine has is not known to a plan unless the configuration says so; then as many as are
asked for are planned, and the launch compares them with what is there.
"""

from dataclasses import dataclass

from flagscale.chips import find_chip, visible_ids
from flagscale.chips.records import GENERIC_CPU, NVIDIA, Chip
from flagscale.errors import ConfigError, Fault
from flagscale.runner.config.hostfile import Host
from flagscale.runner.config.load import Config
from flagscale.runner.plan.common import environment_of


@dataclass(frozen=True, slots=True)
class Share:
    """A part of one host. device_ids: the chips that a replica has there; none where it runs on the CPU."""

    host: Host
    device_ids: tuple[int, ...]

    @property
    def takes(self) -> tuple[str, ...]:
        return tuple(f"{self.host.name}/{index}" for index in self.device_ids)


Place = tuple[Share, ...]
"""the hosts of one replica, its head first"""


@dataclass(frozen=True, slots=True)
class Need:
    """What one replica of a model takes: chips, and the words that say where the number comes from."""

    path: str
    num_devices: int
    reason: str


def chip_of(host: Host, engine: str | None = None) -> Chip:
    """The chip of a host; where nobody names it, the CPU for an engine that needs no other, else NVIDIA's."""
    found = find_chip(host.chip) if host.chip else None
    return found or (GENERIC_CPU if engine in ("native", "llama_cpp") else NVIDIA)


def find_devices(config: Config, host: Host) -> tuple[int, ...] | None:
    """The ids of the chips that the job may use on a host; None where only the host itself knows."""
    runner = config.experiment.runner
    listed = visible_ids(chip_of(host), dict(environment_of(config, host)))
    if listed:
        return listed[: host.slots]
    if runner.hostfile or runner.nproc_per_node:
        return tuple(range(host.slots))
    return None


class Ground:
    """The chips of all hosts, given out piece by piece to the models of a service."""

    def __init__(self, config: Config) -> None:
        self.hosts = config.hosts
        self.free = {host.name: find_devices(config, host) for host in config.hosts}
        self.next_id = 0
        self.turn = 0

    def place(self, need: Need, wanted: int, only: str | None = None) -> list[Place]:
        """Places for `wanted` replicas, on the host `only` where one is named.

        Raises:
            ConfigError: there are fewer chips than that.
        """
        before = dict(self.free)
        places = self.place_more(need, wanted, only)
        if len(places) < wanted:
            seen = {name: free for name, free in before.items() if only in (None, name)}
            raise ConfigError([_describe_lack(need, wanted, seen)])
        return places

    def place_more(self, need: Need, at_most: int, only: str | None = None) -> list[Place]:
        """As many places as there are chips for, up to `at_most`."""
        places: list[Place] = []
        hosts = tuple(host for host in self.hosts if only in (None, host.name))
        while len(places) < at_most and (place := self._place(need.num_devices, hosts)):
            places.append(place)
        return places

    def _place(self, num_devices: int, hosts: tuple[Host, ...]) -> Place | None:
        if num_devices == 0:
            self.turn += 1
            return (Share(hosts[(self.turn - 1) % len(hosts)], ()),)
        for host in hosts:
            free = self.free[host.name]
            if free is None:  # this machine, whose chips are counted at the launch
                self.next_id += num_devices
                return (Share(host, tuple(range(self.next_id - num_devices, self.next_id))),)
            if len(free) >= num_devices:
                self.free[host.name] = free[num_devices:]
                return (Share(host, free[:num_devices]),)
        return self._place_over_hosts(num_devices, hosts)

    def _place_over_hosts(self, num_devices: int, hosts: tuple[Host, ...]) -> Place | None:
        """Whole hosts, all with equally many chips, since every engine expects that."""
        shares: list[Share] = []
        for host in hosts:
            free = self.free[host.name] or ()
            if len(free) < host.slots or (shares and len(shares[0].device_ids) != len(free)):
                continue
            shares.append(Share(host, free))
            if sum(len(share.device_ids) for share in shares) == num_devices:
                self.free |= {share.host.name: () for share in shares}
                return tuple(shares)
        return None


def _describe_lack(need: Need, wanted: int, free: dict[str, tuple[int, ...] | None]) -> Fault:
    total = sum(len(ids or ()) for ids in free.values())
    what = f"needs {need.num_devices} chips ({need.reason})"
    if wanted > 1:
        what = f"{wanted} replicas of {need.num_devices} chips ({need.reason}) need {wanted * need.num_devices}"
    where = ", ".join(f"{name} has {len(ids or ())}" for name, ids in free.items())
    expected = "fewer replicas or smaller parallel sizes"
    if total >= wanted * need.num_devices:
        expected = "replicas that fit on one host, or take whole hosts of equally many chips"
    return Fault(need.path, f"{what}, but {where} free", expected)
