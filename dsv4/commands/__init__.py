"""The commands of `dsv4`, one file each: flags (`add`) and handler (`run`), which imports what does the work."""
