"""Terminal programs behind the commands: their printing and reading. The flags are in dsv4/commands/*.py."""
