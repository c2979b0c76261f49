"""``python -m driftscope.cli``."""

from driftscope.cli import main

main()
