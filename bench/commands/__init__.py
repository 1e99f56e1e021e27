"""One file a subcommand: add(parser) says what it takes, run(args) does it and returns the exit status."""
