"""Text of Debian packages as a training corpus: download, text of each format, unique lines, data card."""
