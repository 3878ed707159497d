"""FusionBench's command with our ops."""

from . import main

main()
