"""A task is a folder: its words in `__init__`, what it does in the files beside; `registry` lists them."""
