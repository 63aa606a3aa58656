"""What ``benchmarks/gpu.py`` is made of: engines that share one process and one model, ceilings, report, picture."""
