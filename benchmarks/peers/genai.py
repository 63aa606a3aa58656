"""ONNX Runtime genai; ``int8`` and ``int4`` hold blocks of 32 weights, multiplied as int8 (accuracy_level 4)."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
from protocol import Clock, Setup, require_one


def convert(setup: Setup) -> None:
    """Runs the model builder; the prompt's last position alone reaches the head."""
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-m", str(setup.model), "-p", setup.precision]
    command += ["-o", str(setup.converted), "-e", "cpu", "-c", str(setup.converted) + ".work"]
    subprocess.run([*command, "--extra_options", "accuracy_level=4", "prune_lm_head=true"], check=True)


class Engine:
    """An ONNX Runtime genai model."""

    def __init__(self, setup: Setup) -> None:
        import onnxruntime_genai as og

        self._og = og
        self.versions = {"onnxruntime-genai": version("onnxruntime-genai")}
        self.nbytes = _matrix_bytes(setup.converted / "model.onnx")
        _set_threads(setup.converted / "genai_config.json", setup.threads)
        self._model = og.Model(str(setup.converted))

    def run(self, prompt: list[int], new: int, batch: int) -> Clock:
        require_one(batch)
        clock = Clock()
        params = self._og.GeneratorParams(self._model)
        params.set_search_options(max_length=len(prompt) + new, min_length=len(prompt) + new, do_sample=False)
        generator = self._og.Generator(self._model, params)
        tokens = np.array(prompt, dtype=np.int32)
        clock.begin()
        generator.append_tokens(tokens)
        for _ in range(new):
            generator.generate_next_token()
            clock.token(int(generator.get_next_tokens()[0]))
        return clock


def _set_threads(path: Path, threads: int) -> None:
    config = json.loads(path.read_text())
    config["model"]["decoder"]["session_options"]["intra_op_num_threads"] = threads
    path.write_text(json.dumps(config, indent=2))


def _matrix_bytes(path: Path) -> int:
    """Of all weights that the graph multiplies by, scales included."""
    import onnx

    graph = onnx.load(str(path), load_external_data=False).graph
    sizes = {
        tensor.name: math.prod(tensor.dims) * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        for tensor in graph.initializer
    }
    read = {name for node in graph.node if "MatMul" in node.op_type for name in node.input}
    return sum(size for name, size in sizes.items() if name in read)
