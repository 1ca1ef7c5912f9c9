"""A service of a model that no YAML describes: the configuration that a folder with weights in it asks for."""

from pathlib import Path
from typing import Any

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


def choose_engine(path: Path) -> str:
    """What runs a model that nobody chose an engine for: what comes with this toolkit, if it can."""
    is_gguf = path.suffix == ".gguf" or (path.is_dir() and any(path.glob("*.gguf")))
    return "llama_cpp" if is_gguf else "native"


def compose_model(name: str, engine: str | None, cwd: Path) -> Composed:
    """The configuration of a service of one model; its outputs go to `./outputs/<model's name>`."""
    path = Path(name).expanduser()
    model = str(path.absolute()) if path.exists() else name
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
                "engine_args": {"model": model, "served_model_name": served_name},
            }
        ],
    }
    return Composed(values, cwd, f"serve {name}")
