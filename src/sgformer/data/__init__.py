"""Data: image readers, folder layouts, checks, and the embedded data set."""
