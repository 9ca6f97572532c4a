"""The commands of `dsv4`, one file each: flags (`add`) and a handler (`run`) that imports the implementation."""
