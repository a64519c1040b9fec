"""`python -m controlprefix.cli`, as `accelerate launch` needs it."""

from controlprefix.cli import main

main()
