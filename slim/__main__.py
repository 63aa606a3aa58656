"""``python -m slim``: the same as ``slim``."""

from slim.cli import main

main(prog_name="slim")
