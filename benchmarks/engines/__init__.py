"""Parts of `dsv4 bench engine`; what it shares with `dsv4 bench model` lies in comparison/."""
