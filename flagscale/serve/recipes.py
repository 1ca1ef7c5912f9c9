"""A service of a model that no YAML describes: the configuration that a folder with weights in it asks for."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flagscale.errors import UserError, find_nearest
from flagscale.runner.config.compose import Composed

HUB_ENGINES = ("vllm", "sglang")


def is_model(name: str, engine: str | None) -> bool:
    """Whether a word means a model itself: a folder with one, a file, or for some engines a name of a hub."""
    path = Path(name).expanduser()
    if path.suffix in (".yaml", ".yml"):
        return False
    if path.is_dir():
        return (path / "config.json").is_file() or any(path.glob("*.gguf"))
    return path.suffix == ".gguf" or (engine in HUB_ENGINES and "/" in name)


def locate_model(name: str) -> str:
    """A path as it is meant where it is typed; a name of a hub as it is."""
    path = Path(name).expanduser()
    return str(path.absolute()) if path.exists() or name.startswith((".", "~")) else name


def find_path_fault(name: str) -> str | None:
    """Why a word that can only be meant as a path of a model or of a YAML is neither; None where it is none."""
    path = Path(name).expanduser().absolute()
    if path.is_dir():
        return f"the folder {path} holds no model: no config.json and no *.gguf"
    return None if path.exists() or not name.startswith((".", "/", "~")) else describe_missing(path)


def describe_missing(path: Path) -> str:
    """That there is no model at an absolute path, and what there is near it."""
    parent = next(folder for folder in path.parents if folder.is_dir())
    near = find_nearest(path.name, [item.name for item in parent.iterdir()]) if parent == path.parent else None
    hint = f"did you mean `{parent / near}`?" if near else f"{parent} is the part of it that exists"
    return f"there is no model at {path}; {hint}"


def choose_engine(path: Path) -> str:
    """What runs a model that nobody chose an engine for: what comes with this toolkit, if it can."""
    is_gguf = path.suffix == ".gguf" or (path.is_dir() and any(path.glob("*.gguf")))
    return "llama_cpp" if is_gguf else "native"


def compose_model(name: str, engine: str | None, cwd: Path, overrides: Sequence[str] = ()) -> Composed:
    """The configuration of a service of one model; its outputs go to `./outputs/<model's name>`.

    overrides: `dotted.path=value`, laid over it

    Raises:
        UserError: an override that cannot be read.
    """
    path = Path(name).expanduser()
    served_name = path.stem if path.suffix == ".gguf" else path.absolute().name
    serve_id = "".join(letter if letter.isalnum() or letter in "_.+@-" else "-" for letter in served_name)
    chosen = engine or choose_engine(path)
    values: dict[str, Any] = {
        "experiment": {
            "exp_name": serve_id,
            "exp_dir": f"./outputs/{serve_id}",
            "task": {"type": "serve"},
            "runner": {},
        },
        "action": "run",
        "serve": [
            {
                "serve_id": serve_id,
                "engine": chosen,
                "engine_args": {"model": locate_model(name), "served_model_name": served_name},
            }
        ],
    }
    return Composed(_lay_over(values, overrides), cwd, f"serve {name}")


def _lay_over(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError, safe_load

    tree = OmegaConf.create(values)
    for override in overrides:
        path, is_given, text = override.lstrip("+").partition("=")
        try:
            if not is_given:
                raise ValueError
            OmegaConf.update(tree, path, safe_load(text), force_add=True)
        except (OmegaConfBaseException, YAMLError, ValueError, TypeError):
            raise UserError(f"`{override}` is no override that can be read; expected `dotted.path=value`") from None
    plain: dict[str, Any] = OmegaConf.to_container(tree)  # type: ignore[assignment]
    return plain
