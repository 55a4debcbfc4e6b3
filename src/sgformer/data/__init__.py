"""Images in: readers, folder layouts, checks, and the embedded data set."""
