"""Parts of `dsv4 bench model`. Each contender lives in a process of its own."""
