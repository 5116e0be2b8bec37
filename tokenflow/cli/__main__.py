"""`python -m tokenflow.cli`, as the command `tokenflow`."""

from tokenflow.cli.main import main

main()
