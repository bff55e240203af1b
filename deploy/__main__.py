"""`python -m deploy` is `spotserve`."""

from deploy.cli import main

main()
