"""One harness for every benchmark: contenders in processes of their own, rounds in turns, rows that are kept."""
