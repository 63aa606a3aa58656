"""What ``benchmarks/quality.py`` measures: models and texts, methods, and the peers that quantise in their own place.

``worker.py`` runs one peer in an interpreter of its own and answers lines of JSON; ``compressor.py`` (llm-compressor)
and ``ao.py`` (torchao) are one peer each. All of them, slim too, are scored by ``slim.runtime.perplexity.score`` on
the same tokens, which the driver cuts once.
"""
