"""The experiment-level YAML: what runs, where, and with which environment.

The keys are FlagScale's (`experiment.*`). Where FlagScale spells one idea twice, `spellings.py` has brought it to one
field before these models see it.
"""

import json
import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError

from flagscale import env
from flagscale.errors import find_nearest
from flagscale.runner.config.section import Section
from flagscale.runner.config.slurm import Slurm

Seconds = float
TaskType = Literal["train", "inference", "serve", "compress", "rl"]
TASK_TYPES: tuple[TaskType, ...] = ("train", "inference", "serve", "compress", "rl")
DEFAULT_BACKENDS: dict[TaskType, str] = {
    "train": "megatron",
    "inference": "vllm",
    "serve": "vllm",
    "compress": "llmcompressor",
    "rl": "verl",
}


_CONTAINER = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_OF_BASH = frozenset(
    {
        *("_", "BASHOPTS", "BASHPID", "BASH_ARGC", "BASH_ARGV", "BASH_COMMAND", "BASH_LINENO"),
        *("BASH_SOURCE", "BASH_SUBSHELL", "BASH_VERSINFO", "OPTIND", "DIRSTACK", "EPOCHREALTIME"),
        *("EPOCHSECONDS", "EUID", "FUNCNAME", "GROUPS", "HISTCMD", "LINENO", "PIPESTATUS", "PPID", "RANDOM"),
        *("SECONDS", "SHELLOPTS", "SHLVL", "SRANDOM", "UID"),
    }
)
"""variables that bash sets itself: a value given to one does not arrive"""


def _check_variable(name: str) -> str:
    if not _VARIABLE.fullmatch(name):
        raise ValueError("a name of a variable: letters, digits and _, no digit first")
    if name in (env.RUN_TOKEN, env.KEPT_TOKEN, env.RANK_DIR):
        raise ValueError("another name: the launcher itself sets this variable")
    if name in _OF_BASH:
        raise ValueError("another name: bash sets this variable itself")
    return name


def _check_program(word: str) -> str:
    if not word.strip() or word.startswith("-"):
        raise ValueError("the name or the path of a program")
    return word


def _check_container(name: str) -> str:
    if not _CONTAINER.fullmatch(name):
        raise ValueError("the name of a container: letters, digits, _, . and -, a letter or digit first")
    return name


def _read_json(value: Any) -> Any:
    """A mapping, or the JSON text of one, as the command line gives it."""
    if not isinstance(value, str):
        return value
    try:
        read = json.loads(value)
    except (ValueError, RecursionError):
        read = None
    if not isinstance(read, dict):
        raise ValueError("a mapping, or the text of a JSON object")
    return read


def _check_router(values: dict[str, Any]) -> dict[str, Any]:
    """Only what is the user's to set: address and keys come from elsewhere."""
    from flagscale.serve.router.settings import RouterSettings

    known = RouterSettings.model_fields.keys() - {"host", "port", "api_keys", "admin_token", "pair_policy"}
    for name in values.keys() - known:
        near = find_nearest(name, known)
        raise ValueError(f"settings of the router, which has no `{name}`" + f"; did you mean `{near}`?" * bool(near))
    try:
        RouterSettings(**values)
    except ValidationError as error:
        row = error.errors(include_url=False, include_context=False, include_input=False)[0]
        raise ValueError(f"for `{'.'.join(map(str, row['loc']))}`: {row['msg']}") from None
    return values


VariableName = Annotated[str, AfterValidator(_check_variable)]
Program = Annotated[str, AfterValidator(_check_program)]
Environment = dict[VariableName, str]


class Task(Section):
    """What runs."""

    type: TaskType = "train"
    backend: str | None = None
    """megatron, vllm, sglang, llama_cpp, verl, ..; None: the default of the task type"""
    entrypoint: str | None = None
    """a script, relative to the project root; for `rl` a Python module"""
    unknown_args: Literal["error", "warn", "pass"] = "error"
    """what becomes of a backend argument that the backend's catalogue does not hold"""


class Request(Section):
    """The request model of a composed service: names of its fields and their types."""

    args: list[str] = Field(default_factory=list)
    types: list[str] = Field(default_factory=list)


class Deploy(Section):
    """How a service is put up."""

    port: int | None = Field(default=None, ge=1, le=65535)
    """where the service answers; default the model's own `port`, else 8000"""
    host: str | None = None
    """the address that it listens on; default the model's own `host`, else 127.0.0.1"""
    api_key_env: VariableName | None = None
    """the environment variable that holds the service's API key; needed for any address but the loopback's"""
    router: Annotated[dict[str, Any], AfterValidator(_check_router)] = Field(default_factory=dict)
    """settings of the router in front of the replicas"""
    host_lost_after_s: Seconds = Field(default=120, gt=0)
    """a replica that neither answers nor can be reached over SSH for so long is replaced on other chips"""
    use_fs_serve: bool = True
    enable_composition: bool = False
    """the models are classes that take each other's results; see `graph.py`"""
    name: str | None = None
    """the path that a graph of models answers at; default /"""
    request: Request | None = None
    working_dir: str | None = None
    """a folder whose files a graph's nodes get on every host, and start in"""
    admin_token_env: VariableName | None = None
    """the environment variable with the token of who adds replicas to the running service; without it nobody may"""
    prefill_decode_disaggregation: bool = False
    """prompts and what follows them are computed by different replicas"""
    prefill_num: int = Field(default=1, ge=1)
    decode_num: int = Field(default=1, ge=1)
    prefill_address: str = "auto"
    """the host whose chips the prefill replicas get; auto: the first with room"""
    decode_address: str = "auto"
    prefill_decode_strategy: Literal["slo", "robin", "random"] = "slo"
    """which pair takes a request: the one with the fewest tokens in flight, with the fewest requests, any"""
    prefill_decode_connector: str | None = None
    """what hands the cache over in vLLM; default what `engine_args.kv_transfer_config` names, else NixlConnector"""
    prefill_decode_log_dir: str | None = None
    """where `prefill_<i>/` and `decode_<i>/` have the replicas' logs; default with each replica's other files"""
    decode_gpu_memory_utilization: float = Field(default=0.7, gt=0, le=1)
    """`gpu_memory_utilization` of decode replicas; their caches arrive beside what the engine takes for itself"""


class CliArgs(Section):
    """What `flagscale serve` was told on its command line."""

    model_path: str | None = None
    port: int | None = Field(default=None, ge=1, le=65535)
    engine_args: Annotated[dict[str, Any], BeforeValidator(_read_json)] = Field(default_factory=dict)


class Torchrun(Section):
    """Options of `torchrun` that pass through `experiment.runner` under their own names."""

    rdzv_backend: str | None = None
    """None: static over several hosts, so that ranks are where the hostfile puts them; c10d on one host, or where
    `max_restarts` asks for it"""
    rdzv_endpoint: str | None = None
    rdzv_id: str | int | None = None
    rdzv_conf: str | None = None
    standalone: bool | None = None
    max_restarts: int | None = Field(default=None, ge=0)
    monitor_interval: Seconds | None = None
    start_method: Literal["spawn", "fork", "forkserver"] | None = None
    event_log_handler: str | None = None
    role: str | None = None
    module: bool | None = None
    no_python: bool | None = None
    run_path: bool | None = None
    local_ranks_filter: str | None = None
    node_rank: int | None = Field(default=None, ge=0)
    local_addr: str | None = None
    logs_specs: str | None = None
    numa_binding: str | None = None
    signals_to_handle: str | None = None
    tee: str | int = "3"
    redirects: str | int = "3"


class Runner(Torchrun):
    """Where and how the job's processes are started."""

    type: Literal["ssh", "local", "cloud", "ray", "slurm"] = "ssh"
    """ssh: the hosts of `hostfile`, this machine where there is none; local: this machine alone; cloud: this machine as
    `node_rank` of `nnodes`; ray: places of a Ray cluster, ours over `hostfile` or the one at `ray_address`; slurm:
    nodes that Slurm chooses"""
    backend: Annotated[str, AfterValidator(_check_program)] = "torchrun"
    bin_dir: str | None = None
    """a folder put first on PATH: where the `vllm`, `python` or `llama-server` of a service's engine lies"""
    nnodes: int | str | None = None
    """number of hosts; of `min:max` the minimum counts"""
    nproc_per_node: int | None = Field(default=None, ge=1)
    hostfile: str | None = None
    ssh_port: int | None = Field(default=22, ge=1, le=65535)
    ssh_client: Literal["paramiko", "openssh"] = "paramiko"
    """openssh: the machine's own `ssh`, where its configuration, jump hosts or agents are needed"""
    accept_new_host_keys: bool = False
    """remember the keys of hosts that were never met; a key that changed is refused in any case"""
    master_addr: str | None = None
    master_port: int | None = Field(default=None, ge=1, le=65535)
    log_dir: str | None = None
    per_node_task: bool = False
    no_shared_fs: bool = False
    """each host has an experiment folder of its own: scripts go out to it, logs are fetched from it"""
    enable_monitoring: bool = False
    hang_detection_timeout: Seconds = Field(default=1800, gt=0)
    docker: Annotated[str, AfterValidator(_check_container)] | None = None
    """name of a container on every host: there the job runs, and what starts and watches it"""
    python: Program | dict[str, Program] | None = None
    """the interpreter of hosts where it is not the launcher's own, for all or by host name"""
    device_type: str | None = None
    """the chip of hosts whose hostfile line names none: a record of `flagscale.chips`, or `gpu`, `cpu`"""
    ray_port: int = Field(default=6379, ge=1, le=65535)
    ray_dashboard_port: int = Field(default=8265, ge=1, le=65535)
    ray_address: str | None = None
    """a running Ray cluster to take places of: `host:port`, or `auto` for the one that this machine is part of"""
    ray_wait_s: Seconds = Field(default=60, gt=0)
    """how long a launch waits for Ray to give the places that it asks for"""
    slurm: Slurm = Field(default_factory=Slurm)
    runtime_env: str | None = None
    cli_args: CliArgs | None = None
    deploy: Deploy = Field(default_factory=Deploy)
    foreground: bool = False
    """stay attached to the job and return its exit code"""
    start_timeout_s: Seconds = Field(default=1800, gt=0)
    """how long `run` waits for all ranks to be up"""


class Commands(Section):
    """Shell code around the job, run on every host."""

    before_start: str | None = None
    after_stop: str | None = None


class Experiment(Section):
    """The `experiment` section."""

    exp_dir: str = Field(min_length=1)
    """root of every output; relative to the folder in which the command is typed"""
    exp_name: str = ""
    task: Task = Field(default_factory=Task)
    runner: Runner = Field(default_factory=Runner)
    envs: Environment = Field(default_factory=dict)
    device_type_specific: dict[str, Environment] = Field(default_factory=dict)
    """environment by chip type, over `envs`"""
    node_specific: dict[str, Environment] = Field(default_factory=dict)
    """environment by host name, over `device_type_specific`"""
    node_args: dict[str, dict[str, dict[str, Any]]] = Field(default_factory=dict)
    """engine arguments by host name"""
    cmds: Commands = Field(default_factory=Commands)
    secrets: list[VariableName] = Field(default_factory=list)
    """names of environment variables whose values are written nowhere"""
    auto_tuner: dict[str, Any] | None = None

    seed: Any = None
    save_steps: Any = None
    load: Any = None
    ckpt_format: Any = None
    model: Any = None
    vq_model: Any = None
    """these six are read only by interpolations in task files"""
