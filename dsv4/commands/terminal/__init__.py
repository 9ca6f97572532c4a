"""The programs behind the commands: what they print and read in a terminal. A command file beside has the flags."""
