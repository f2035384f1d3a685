"""`python -m excise.cli`."""

from excise.cli import main

main()
