"""`python -m eaptk`: the command line where the console script is not on the path."""

from eaptk.cli import main

main()
