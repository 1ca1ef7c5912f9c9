"""Packaging: the metadata stands in pyproject.toml; here is what it cannot say.

A wheel must work without a checkout, so the trees that users reach by name (`flagscale train <model>` reads
`examples/<model>/conf`) travel inside the package, under `flagscale/share`, which is then a job's root.
"""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

# An entry point's copy has no `__init__.py` beside it, so that `import flagscale` still finds the package.
SHARED = ("examples", "hardware", "tools", "third_party/*/pin.yaml", "run.py", "flagscale/train/train_gpt.py")


class BuildWithSharedTrees(build_py):
    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        root = Path(__file__).parent
        share = Path(self.build_lib) / "flagscale" / "share"
        for pattern in SHARED:
            for src in sorted(root.glob(pattern)):
                dst = share / src.relative_to(root)
                dst.parent.mkdir(parents=True, exist_ok=True)
                if src.is_dir():
                    shutil.copytree(src, dst, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
                else:
                    shutil.copy2(src, dst)


setup(cmdclass={"build_py": BuildWithSharedTrees})
