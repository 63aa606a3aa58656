"""The engines that ``benchmarks/cpu.py`` measures, and what the driver and its workers share.

``worker.py`` runs one engine in an interpreter of its own and answers lines of JSON; ``llama.py``, ``ct2.py``,
``genai.py``, ``pytorch.py`` and ``ours.py`` are one engine each, and import nothing of the driver's. Their names differ
from those of the packages they import, because a worker's first import path is this folder.
"""
