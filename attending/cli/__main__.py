"""`python -m attending.cli`."""

from attending.cli import main

main()
