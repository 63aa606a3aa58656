"""The environments of the peers: which there are, and how each is made."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HOME = Path(__file__).resolve().parents[1] / ".peers"

# torch comes first where there is one, pinned, so that nothing else brings another build of it.
ENVIRONMENTS: dict[str, list[list[str]]] = {
    "llama_cpp": [["llama-cpp-python", "gguf"]],
    "ctranslate2": [["torch"], ["ctranslate2", "transformers", "safetensors"]],
    "ort_genai": [["torch"], ["onnxruntime-genai", "onnxruntime", "onnx", "onnx-ir", "transformers", "safetensors"]],
    "pytorch": [["torch"], ["torchao", "transformers", "safetensors"]],
    "picture": [["matplotlib"]],
    "llmcompressor": [["torch"], ["llmcompressor"]],
}
FREE = {"llmcompressor"}  # takes transformers up to 5.21 alone: nothing but torch is pinned
BUILD = {"CMAKE_ARGS": "-DGGML_NATIVE=ON"}  # llama.cpp comes as source: use what this processor has


def interpreter(environment: str) -> Path:
    """Where the environment's Python is, if it is there."""
    return HOME / environment / "bin" / "python"


def install(environment: str) -> None:
    """Makes the environment with the interpreter that runs this; llama.cpp takes ten minutes on two cores.

    Raises:
        subprocess.CalledProcessError: what pip said is on the screen.
    """
    HOME.mkdir(exist_ok=True)
    (HOME / ".gitignore").write_text("*\n")
    subprocess.run([sys.executable, "-m", "venv", str(HOME / environment)], check=True)
    pip = [str(interpreter(environment)), "-m", "pip", "install"]
    pinned = ["-c", str(ROOT / "constraints.txt")]
    for packages in ENVIRONMENTS[environment]:
        constraints = [] if environment in FREE and packages != ["torch"] else pinned
        subprocess.run([*pip, *constraints, *packages], check=True, env=os.environ | BUILD)
