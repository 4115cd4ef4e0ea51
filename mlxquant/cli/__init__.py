"""The command line: one short file per command, loaded when it is called, so that `--help` costs nothing."""
