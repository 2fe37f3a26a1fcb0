"""`python -m regtool`."""

from regtool.cli.app import main

main()
