"""`python -m search_r3.cli`."""

from . import main

main()
