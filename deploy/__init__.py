"""How it runs: the command line and the one-machine supervisor, which also plays the cloud."""
