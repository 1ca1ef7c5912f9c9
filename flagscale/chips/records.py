"""What a job has to be told because of the chips it runs on.

A record is data and nothing here looks at the machine: a plan for a hundred H100 hosts is made on a laptop. The backend
arguments of a record are defaults: they lie beneath what the user writes, so a user's word always wins.

Most vendors' stacks answer to more than one visible-devices variable, one for their own runtime and one for the CUDA
interface they imitate, and a job in which the two differ sees other devices than it was given. So a record names all
of them and `visible_env` sets all of them. What nobody has published stands in no record: a PCI vendor or an interface
variable that is None or left out is unknown, not absent.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

Arguments = Mapping[str, bool | int | float | str]
"""Names as in the YAML (snake_case) -> values; a switch is True, and False for one that is to be left off."""


GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"


def _nothing() -> Mapping[str, Any]:
    return MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Chip:
    """A kind of chip.

    name: of the record, and of the folder in hardware/ that holds its patches
    aliases: what hostfiles (`type=A800`) and YAML files (`device_type: gpu`) call it; letter case does not matter
    device: how torch names it
    collectives: the backend of torch.distributed
    visible_devices: the environment variables that choose among a host's chips, the first one decides
    env: exported for every job, beneath `experiment.envs`
    backend_args: backend -> argument defaults
    discovery: the program that lists a host's chips, None where they are counted otherwise
    library: the vendor's collective library, beneath `collectives`
    container_devices: the variable by which the vendor's container runtime is told which chips to let in
    interfaces: the variables that name the network interface of collectives
    pci_vendor: of its PCI functions, None where it is not known
    driver_node: a file below /dev that its driver makes, once a host
    device_nodes: a pattern of the files below /dev that its driver makes, one a device; the digits are the device's id
    devices_per_card: how many devices, each with an id of its own, one card is
    """

    name: str
    vendor: str
    aliases: tuple[str, ...]
    device: str
    collectives: str
    visible_devices: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=_nothing)
    backend_args: Mapping[str, Arguments] = field(default_factory=_nothing)
    discovery: str | None = None
    library: str | None = None
    container_devices: str | None = None
    interfaces: tuple[str, ...] = (GLOO_INTERFACE,)
    pci_vendor: int | None = None
    driver_node: str | None = None
    device_nodes: str | None = None
    devices_per_card: int = 1

    def visible_env(self, ids: Sequence[int]) -> dict[str, str]:
        """What lets a process see the devices `ids` and no others, in that order; none of them hides every device.

        Raises:
            UserError: an id is negative or named twice (CUDA's runtime then shows no device, and says nothing).
        """
        from flagscale.chips.ids import check_ids

        check_ids(self, ids)
        return dict.fromkeys(self.visible_devices, ",".join(map(str, ids)))

    def interface_env(self, interface: str) -> dict[str, str]:
        """What makes collectives of a job use the network interface `interface` (`eth0`)."""
        return dict.fromkeys(self.interfaces, interface)


GENERIC_CPU = Chip(
    name="Generic_CPU",
    vendor="Generic",
    aliases=("cpu",),
    device="cpu",
    collectives="gloo",
    env=MappingProxyType(
        {
            # Megatron refuses tensor parallelism without it, and does not ask whether there is a CUDA device.
            "CUDA_DEVICE_MAX_CONNECTIONS": "1",
            # A rank that waits must not burn the core that the rank it waits for needs.
            "OMP_WAIT_POLICY": "PASSIVE",
            "OMP_NUM_THREADS": "1",
            # Megatron compiles small fused functions; on a CPU a compiler run costs more than a whole tiny training.
            "TORCHDYNAMO_DISABLE": "1",
        }
    ),
    backend_args=MappingProxyType(
        {
            "megatron": MappingProxyType(
                {
                    "distributed_backend": "gloo",
                    "transformer_impl": "local",
                    "use_cpu_initialization": True,
                    "no_persist_layer_norm": True,
                    "no_gradient_accumulation_fusion": True,
                    "no_masked_softmax_fusion": True,
                    "no_bias_gelu_fusion": True,
                    "no_bias_swiglu_fusion": True,
                    "no_bias_dropout_fusion": True,
                    "no_rope_fusion": True,
                    "num_workers": 0,
                }
            )
        }
    ),
)

# Megatron asks for it on every chip, whether or not the runtime beneath knows it.
MEGATRON_ENV = MappingProxyType({"CUDA_DEVICE_MAX_CONNECTIONS": "1"})

NVIDIA_ALIASES = (
    "gpu", "cuda", "A10", "A100", "A30", "A40", "A800", "B100", "B200", "B300", "GB200", "GB300", "H100", "H20", "H200",
    "H800", "L20", "L4", "L40", "L40S", "RTX4090", "RTX5090", "T4", "V100",
)  # fmt: skip

NVIDIA = Chip(
    name="NVIDIA",
    vendor="NVIDIA",
    aliases=NVIDIA_ALIASES,
    device="cuda",
    collectives="nccl",
    visible_devices=("CUDA_VISIBLE_DEVICES",),
    env=MEGATRON_ENV,
    discovery="nvidia-smi",
    library="NCCL",
    container_devices="NVIDIA_VISIBLE_DEVICES",
    interfaces=(GLOO_INTERFACE, "NCCL_SOCKET_IFNAME"),
    pci_vendor=0x10DE,
    driver_node="nvidiactl",
    device_nodes=r"nvidia(\d+)",
)

ILUVATAR = Chip(
    name="BI_V150",
    vendor="Iluvatar CoreX",
    aliases=("BI-V150", "iluvatar", "corex"),
    device="cuda",
    collectives="nccl",
    visible_devices=("CUDA_VISIBLE_DEVICES", "ILUVATAR_VISIBLE_DEVICES"),
    env=MEGATRON_ENV,
    discovery="ixsmi",
    library="IXCCL",
    container_devices="IX_VISIBLE_DEVICES",
    interfaces=(GLOO_INTERFACE, "NCCL_SOCKET_IFNAME"),
    pci_vendor=0x1E3E,
    device_nodes=r"iluvatar(\d+)",
    # One card carries two dies, and each is a device of its own: ixsmi lists 16 of them on a host with 8 cards.
    devices_per_card=2,
)

CAMBRICON = Chip(
    name="Cambricon_MLU",
    vendor="Cambricon",
    aliases=("mlu", "MLU370", "MLU580", "MLU590"),
    device="mlu",
    collectives="cncl",
    visible_devices=("MLU_VISIBLE_DEVICES",),
    env=MEGATRON_ENV,
    discovery="cnmon",
    library="CNCL",
    container_devices="CAMBRICON_VISIBLE_DEVICES",
    pci_vendor=0xCABC,
    device_nodes=r"cambricon_dev(\d+)",
)

HUAWEI = Chip(
    name="Huawei_Atlas800TA3",
    vendor="Huawei Ascend",
    aliases=("npu", "ascend", "910B", "910C", "Ascend910", "Ascend910B", "Ascend910C"),
    device="npu",
    collectives="hccl",
    visible_devices=("ASCEND_RT_VISIBLE_DEVICES", "NPU_VISIBLE_DEVICES"),
    env=MEGATRON_ENV,
    discovery="npu-smi",
    library="HCCL",
    container_devices="ASCEND_VISIBLE_DEVICES",
    interfaces=(GLOO_INTERFACE, "HCCL_SOCKET_IFNAME"),
    pci_vendor=0x19E5,
    driver_node="davinci_manager",
    device_nodes=r"davinci(\d+)",
)

HYGON = Chip(
    name="Hygon_BW1000",
    vendor="Hygon",
    aliases=("hygon", "dcu", "hcu", "BW1000", "K100_AI"),
    device="cuda",
    collectives="nccl",
    visible_devices=("HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"),
    env=MEGATRON_ENV,
    discovery="hy-smi",
    library="RCCL",
    container_devices="HYGON_VISIBLE_DEVICES",
    interfaces=(GLOO_INTERFACE, "NCCL_SOCKET_IFNAME"),
    pci_vendor=0x1D94,
    # Its devices are /dev/dri/renderD*, as those of every graphics card: they count nothing.
    driver_node="kfd",
)

KUNLUNXIN = Chip(
    name="Kunlunxin_R310p",
    vendor="Kunlunxin",
    aliases=("kunlunxin", "R310p", "P800"),
    device="cuda",
    collectives="nccl",
    visible_devices=("XPU_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"),
    env=MEGATRON_ENV,
    discovery="xpu-smi",
    library="BKCL",
    container_devices="NVIDIA_VISIBLE_DEVICES",
    interfaces=(GLOO_INTERFACE, "BKCL_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"),
    driver_node="xpuctrl",
    device_nodes=r"xpu(\d+)",
)

METAX = Chip(
    name="Metax_C550",
    vendor="MetaX",
    aliases=("metax", "maca", "C500", "C550", "C600"),
    device="cuda",
    collectives="nccl",
    visible_devices=("CUDA_VISIBLE_DEVICES", "MACA_VISIBLE_DEVICES"),
    env=MEGATRON_ENV,
    discovery="mx-smi",
    library="MCCL",
    container_devices="CUDA_VISIBLE_DEVICES",
    interfaces=(GLOO_INTERFACE, "MCCL_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"),
    pci_vendor=0x9999,
    driver_node="mxcd",
)

MOORE_THREADS = Chip(
    name="MUSA_S5000",
    vendor="Moore Threads",
    aliases=("musa", "mthreads", "S4000", "S5000"),
    device="musa",
    collectives="mccl",
    visible_devices=("MUSA_VISIBLE_DEVICES", "MTHREADS_VISIBLE_DEVICES"),
    env=MEGATRON_ENV,
    discovery="mthreads-gmi",
    library="MCCL",
    container_devices="MTHREADS_VISIBLE_DEVICES",
    interfaces=(GLOO_INTERFACE, "MCCL_SOCKET_IFNAME"),
    pci_vendor=0x1ED5,
    device_nodes=r"mtgpu\.(\d+)",
)

TSING_MICRO = Chip(
    name="Tsing_micro",
    vendor="Tsingmicro",
    aliases=("tsingmicro", "txda", "TX81"),
    device="txda",
    collectives="tccl",
    visible_devices=("TXDA_VISIBLE_DEVICES",),
    env=MEGATRON_ENV,
    discovery="tsm_smi",
    library="TCCL",
    # /dev/accel/ is the kernel's folder for accelerators of any vendor: the driver's own file says whose they are.
    driver_node="accel_drv_mgr",
    device_nodes=r"accel/accel(\d+)",
)

T_HEAD = Chip(
    name="THead_PPU",
    vendor="T-Head",
    aliases=("ppu", "PPU-ZW810E", "ZW810E"),
    device="cuda",
    collectives="nccl",
    visible_devices=("CUDA_VISIBLE_DEVICES",),
    env=MEGATRON_ENV,
    discovery="ppu-smi",
    container_devices="NVIDIA_VISIBLE_DEVICES",
    interfaces=(GLOO_INTERFACE, "NCCL_SOCKET_IFNAME"),
    pci_vendor=0x1DED,
    driver_node="alixpu_ctl",
    device_nodes=r"alixpu_ppu(\d+)",
)

CHIPS: tuple[Chip, ...] = (
    GENERIC_CPU,
    NVIDIA,
    ILUVATAR,
    CAMBRICON,
    HUAWEI,
    HYGON,
    KUNLUNXIN,
    METAX,
    MOORE_THREADS,
    TSING_MICRO,
    T_HEAD,
)

_BY_NAME: Mapping[str, Chip] = {name.casefold(): chip for chip in CHIPS for name in (chip.name, *chip.aliases)}


def find_chip(name: str) -> Chip | None:
    """The record that `name` means: the record's own name or an alias of it, in any letter case."""
    return _BY_NAME.get(name.casefold())
